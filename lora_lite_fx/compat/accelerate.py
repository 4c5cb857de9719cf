"""Hold the private names of accelerate that this library asks for; accelerate need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn


def offloading_hook_of(module: nn.Module) -> Any:
    """Return the hook by which accelerate moves the weights or inputs of `module` in each call; None without one.

    It stands in for accelerate.hooks, which has no function that tells. Without it accelerate's hooks are seen as any
    other: they are traced, and a warning names them.
    """
    return getattr(module, "_hf_hook", None)
