"""The state of autocast, to be entered again in a backward pass."""

from __future__ import annotations

from typing import Any

import torch


def autocast_of(device: str) -> dict[str, Any]:
    """Return the arguments of `torch.autocast` that give the state of now.

    Args:
        device: the type of device, such as `"cpu"`.
    """
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }
