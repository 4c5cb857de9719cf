"""Answer a model that asks whether a tensor has a gradient as in training, and refuse hooks on tensors.

A graph is traced over frozen weights, where `y.requires_grad` is False of all that a model computes. With adapters it
is True in training. So a trace goes the way of training, and the comparison, which runs without gradients, refuses a
graph for which that matters. A hook on a tensor changes gradients, and no graph has one.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import CaptureError
from ..refusal import is_of_others
from .quirk import Quirk, where_mentioned

_WORDS = (".requires_grad", ".is_leaf", ".grad_fn", ".register_hook")
_TENSOR: Any = Tensor
_ANSWERS: dict[Any, Any] = {
    _TENSOR.requires_grad.__get__: True,
    _TENSOR.is_leaf.__get__: False,
    _TENSOR.grad_fn.__get__: object(),
}


class AnswersAsInTraining(TorchFunctionMode):
    """Answers questions of the model's own code about what it computes as in training with adapters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.register_hook:
            raise CaptureError(
                "a hook on a tensor changes gradients, and a graph has none; a torch.autograd.Function does in a graph"
                " what it does in the model"
            )
        if func in _ANSWERS and _is_computed(args[0]) and _is_of_model(sys._getframe(1)):
            return _ANSWERS[func]
        return func(*args, **kwargs or {})


def _is_of_model(frame: FrameType | None) -> bool:
    """Return whether code of the model asks, through the modes of torch that were asked before."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and not is_of_others(frame)


def _is_computed(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


QUIRK = Quirk(
    lambda model, error: error is None and any(where_mentioned(word)(model, error) for word in _WORDS),
    lambda model, call: AnswersAsInTraining(),
)
