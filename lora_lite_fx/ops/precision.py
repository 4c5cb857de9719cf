"""The precision of parameter work, which autocast would lower."""

from __future__ import annotations

import torch
from torch import Tensor


def double_under_autocast(x: Tensor) -> Tensor:
    """Return `x` in double precision, whose products autocast leaves alone; as it is if it is float32 elsewhere."""
    is_safe = x.dtype is torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return x if is_safe else x.double()
