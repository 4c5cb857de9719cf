"""What all tests share."""

import gc

import torch

# The models are tiny: threads cost more than they gain, and the tests themselves run side by side.
torch.set_num_threads(1)
# They are captured once each: to keep what operators do to fake tensors costs half of a capture and is of no use again.
torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_collection_finish() -> None:
    # Half a million objects of imported modules stay for good: without them, collecting garbage takes half the time.
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)  # tests make few cycles, and look for them seldom
