"""Refuse models that decide at random in Python while they are captured, because a graph would keep one decision."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ...compat.torch import disable_current_modes
from ...errors import COMPILE_INSTEAD, CaptureError


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
        with mock.patch.object(random, "uniform", _uniform_unless_idle(random.uniform)):
            yield
        drawn = ["random"] if random.getstate() != of_python else []
        if numpy is not None and not _is_same(numpy.random.get_state(), of_numpy):
            drawn.append("numpy.random")
        if _state_of_torch() != of_torch:
            drawn.append("torch")
    finally:
        random.setstate(of_python)
        with disable_current_modes():
            torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))
        if numpy is not None:
            numpy.random.set_state(of_numpy)
    if drawn:
        # torch.export records what torch draws, so only symbolic tracing comes here with it.
        examples = "pass example_inputs, so that torch.export records them; or " * ("torch" in drawn)
        raise CaptureError(
            f"{type(model).__name__} draws numbers of {' and '.join(drawn)} in its forward, and a graph would keep"
            f" those of its capture for good. The way out: {examples}draw them from a tensor, such as"
            " torch.rand_like(x). Or switch off what decides at random in training (layerdrop, jitter, SpecAugment), in"
            f" a config or by a test of self.training. Or {COMPILE_INSTEAD}."
        )


def _uniform_unless_idle(uniform: Callable[[float, float], float]) -> Callable[[float, float], Any]:
    """Return `random.uniform` that draws nothing yet for a module which drops its layers with a probability of zero.

    MusicGen draws a number for each layer before it looks at that.
    """

    def drawn(a: float, b: float) -> Any:
        owner = sys._getframe(1).f_locals.get("self")
        return _Undrawn(a, b, uniform) if getattr(owner, "layerdrop", None) == 0 else uniform(a, b)

    return drawn


class _Undrawn:
    """A random number between two that is drawn where it matters: it is not below the lesser. There is no other use."""

    def __init__(self, a: float, b: float, uniform: Callable[[float, float], float]) -> None:
        self._least = min(a, b)
        self._draw: Callable[[], float] = functools.partial(uniform, a, b)

    def __lt__(self, limit: float) -> bool:
        return limit > self._least and self._draw() < limit

    def __bool__(self) -> bool:
        return bool(self._draw())


def _is_same(state: Any, other: Any) -> bool:
    """Compare two states of numpy's generator: a name, an array of keys, and numbers."""
    return bool(state[1].tobytes() == other[1].tobytes() and state[2:] == other[2:])


def _state_of_torch() -> bytes:
    with disable_current_modes():
        return torch.get_rng_state().numpy().tobytes()
