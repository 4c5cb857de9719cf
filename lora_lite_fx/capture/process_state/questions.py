"""See what a model asks of the process while it runs: a graph keeps the answers for good.

A graph has no branches of Python. `if torch.is_autocast_enabled():` is one way of the two in it, in every call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..quirks.quirk import ANSWERED
from ..refusal import is_of_others, line_of
from .python_state import Change

GRAD, AUTOCAST, INFERENCE = (
    "torch.is_grad_enabled()",
    "torch.is_autocast_enabled()",
    "torch.is_inference_mode_enabled()",
)
DTYPE, DETERMINISTIC = "torch.get_default_dtype()", "torch.are_deterministic_algorithms_enabled()"
INFERENCE_REGION = "torch.inference_mode()"

_FUNCTIONS: dict[Any, str] = {
    torch.is_grad_enabled: GRAD,
    torch.is_autocast_enabled: AUTOCAST,
    torch.is_autocast_cpu_enabled: AUTOCAST,
    torch.get_autocast_dtype: AUTOCAST,
    torch.get_autocast_cpu_dtype: AUTOCAST,
    torch.get_autocast_gpu_dtype: AUTOCAST,
    torch.is_inference_mode_enabled: INFERENCE,
    torch.get_default_dtype: DTYPE,
}
"""Functions that are written in C, and what they ask for."""
_CODES: dict[int, str] = {
    id(torch.are_deterministic_algorithms_enabled.__code__): DETERMINISTIC,
    id(torch.is_deterministic_algorithms_warn_only_enabled.__code__): DETERMINISTIC,
    id(torch.get_deterministic_debug_mode.__code__): DETERMINISTIC,
    id(torch.inference_mode.__enter__.__code__): INFERENCE_REGION,
}
"""Functions that are written in Python, and what they ask for; by the id of their code, which is slow to hash."""


_UNSEEN = "a line that is not known, because a profiler runs"


class Questions:
    """What the code of a model asks, with the first line that asks it.

    Nothing public tells of these functions but the profiler of Python, which only this thread has. Where another one
    runs already, those are taken for asked whose answers can be compared.
    """

    def __init__(self) -> None:
        self.asked: dict[str, str] = {}
        self.counted: Change | None = None
        """What the model changes in Python in each call."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what this thread asks in the body."""
        if sys.getprofile() is not None:
            self.asked |= dict.fromkeys((GRAD, AUTOCAST), _UNSEEN)
            yield
            return
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and type(function) is _BUILTIN:
            kind, asking = _FUNCTIONS.get(function), frame
        elif event == "call" and id(frame.f_code) in _CODES and frame.f_back is not None:
            kind, asking = _CODES[id(frame.f_code)], frame.f_back
            if kind is INFERENCE_REGION:
                if not frame.f_locals["self"].mode:
                    return
                asking = asking.f_back or asking if is_of_others(asking) else asking  # torch calls what is decorated
        else:
            return
        if kind is None or kind in self.asked or is_of_others(asking):  # torch computes the same whatever the answer is
            return
        if asking.f_code.co_name not in ANSWERED:
            self.asked[kind] = line_of(asking)


_BUILTIN = type(torch.is_grad_enabled)


def device_of(model: nn.Module) -> str:
    """Return the type of the device that a model runs on."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    return next((tensor.device.type for tensor in tensors), "cpu")
