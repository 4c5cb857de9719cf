"""What tests of `execution` share."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def count_from_zero() -> Iterator[None]:
    """Forget what was compiled, before and after the test, and count anew."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
