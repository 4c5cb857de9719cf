"""What all tests share."""

import torch

# The models are tiny: threads cost more than they gain, and the tests themselves run side by side.
torch.set_num_threads(1)
