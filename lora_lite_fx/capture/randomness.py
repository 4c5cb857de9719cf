"""Refuse models that decide at random in Python while they are captured, because a graph would keep one decision."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Under fake tensors the state would have no data; nothing public leaves a mode for a while.
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import COMPILE_INSTEAD, CaptureError


@contextmanager
def without_python_random(model: nn.Module) -> Iterator[None]:
    """Check that the body, which captures `model`, draws no real random numbers; restore the generators.

    Random operations of a trace draw none, because they have no data.

    Raises:
        CaptureError: it does.
    """
    numpy: Any = sys.modules.get("numpy")  # else the model does not use it
    of_python, of_torch = random.getstate(), _state_of_torch()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
        drawn = ["random"] if random.getstate() != of_python else []
        if numpy is not None and not _is_same(numpy.random.get_state(), of_numpy):
            drawn.append("numpy.random")
        if _state_of_torch() != of_torch:
            drawn.append("torch")
    finally:
        random.setstate(of_python)
        with _disable_current_modes():
            torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))
        if numpy is not None:
            numpy.random.set_state(of_numpy)
    if drawn:
        raise CaptureError(
            f"{type(model).__name__} draws numbers of {' and '.join(drawn)} in its forward, and a graph would keep"
            " those of its capture for good. The way out: draw them from a tensor, such as torch.rand_like(x); or"
            " switch off what decides at random in training (layerdrop, jitter, SpecAugment), in a config or by a test"
            f" of self.training; or {COMPILE_INSTEAD}."
        )


def _is_same(state: Any, other: Any) -> bool:
    """Compare two states of numpy's generator: a name, an array of keys, and numbers."""
    return bool(state[1].tobytes() == other[1].tobytes() and state[2:] == other[2:])


def _state_of_torch() -> bytes:
    with _disable_current_modes():
        return torch.get_rng_state().numpy().tobytes()
