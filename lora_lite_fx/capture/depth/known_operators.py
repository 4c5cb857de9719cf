"""Tell what an operator returns on tensors without data, without asking torch again.

What it returns follows from what its arguments look like. The layers of a model are alike, and so are its two modes, so
that most calls of a run are like one before. For those torch would take some ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...compat.torch import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    schema_of,
    tensors_without_data,
    unseen_by_function_modes,
)


class KnownOperators:
    """Calls operators, each once for arguments of one look."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Callable[[FakeTensorMode], Tensor]] = {}

    def call(self, mode: FakeTensorMode, operator: Any, args: Any, kwargs: Any, looks: Hashable) -> Any:
        """Return what an operator returns: a new tensor each time. Of a known operator it shares no storage.

        Args:
            mode: of the tensors without data.
            operator: any; what a call writes to, or does not return as one tensor with a fixed size, is never known.
            args, kwargs: of the call.
            looks: a key for all that the call depends on, but for the settings of the process.
        """
        if not isinstance(operator, OpOverload):
            return operator(*args, **kwargs)
        key = operator, looks, torch.get_default_dtype(), torch.is_inference_mode_enabled()
        # A mode inside `torch.vmap` would see what torch calls, and only where it is asked.
        with unseen_by_function_modes():
            if (make := self._known.get(key)) is not None:
                return make(mode)
            result = operator(*args, **kwargs)
            if _follows_from_looks(operator, result):
                self._known[key] = tensors_without_data(result)
            return result


def _follows_from_looks(operator: OpOverload, result: Any) -> bool:
    """Tell whether a later call may get a tensor like `result`.

    A tensor of one value may have that value with it. A complex one may be the conjugate of what it shows. Sizes may
    follow from values.
    """
    return (
        not schema_of(operator).is_mutable
        and type(result) is FakeTensor
        and all(isinstance(number, int) for number in (*result.shape, *result.stride()))
        and result.numel() > 1
        and not (result.is_complex() or result.is_neg())
    )
