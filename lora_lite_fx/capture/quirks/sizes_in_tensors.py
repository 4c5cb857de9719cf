"""Follow sizes that a model computes in tensors of one number, as the codecs of sound compute how much they pad.

A trace knows no values of tensors, and `F.pad(x, (0, extra))` needs them. `extra` is known all the same where it is
made of sizes of inputs and of numbers that the model keeps: non-persistent buffers, and tensors that are no buffers.
So are the elements of `torch.tensor(sizes)`, as detectors keep the heights and widths of their features.
It is computed a second time here, of sizes and whole numbers, and exactly.

Needed by Encodec, Mimi and Pocket TTS, which compute how much they pad, and by Sam 3 and other detectors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...compat.torch import FakeTensor, FunctionalTensor, check, disable_current_modes, pytree
from ...compat.torch_modules import buffers_of, is_persistent
from .quirk import Quirk, after_undecided

Quotient = tuple[Any, int]
"""A size or a whole number, and the positive number that it is divided by."""

_LARGEST_WHOLE, _LARGEST_DIVIDED = 2**24, 2**22
"""Up to where a model that divides in float32 finds the same numbers."""


def _plus(one: Quotient, other: Quotient) -> Quotient:
    if one[1] == other[1]:
        return one[0] + other[0], one[1]
    return one[0] * other[1] + other[0] * one[1], one[1] * other[1]


def _minus(one: Quotient, other: Quotient) -> Quotient:
    return _plus(one, (-other[0], other[1]))


def _divided(one: Quotient, other: Quotient) -> Quotient | None:
    by, denominator = other
    if type(by) is not int or by <= 0 or denominator != 1:
        return None
    divisor = one[1] * by
    # The graph refuses longer inputs.
    check(one[0] < (_LARGEST_WHOLE if divisor == 1 else _LARGEST_DIVIDED))
    return one[0], divisor


def _rounded_down(one: Quotient, other: Quotient) -> Quotient | None:
    if type(other[0]) is not int or other[0] <= 0 or (one[1], other[1]) != (1, 1):
        return None
    return one[0] // other[0], 1


_OF_TWO: dict[Any, Callable[[Quotient, Quotient], Quotient | None]] = {
    Tensor.add: _plus,
    Tensor.sub: _minus,
    Tensor.__rsub__: lambda one, other: _minus(other, one),
    Tensor.mul: lambda one, other: (one[0] * other[0], one[1] * other[1]),
    Tensor.div: _divided,
    Tensor.__floordiv__: _rounded_down,
}
_CEIL = (torch.ceil, Tensor.ceil)
_COMPARE: dict[Any, Callable[[Any, Any], Any]] = {
    getattr(Tensor, name): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}
_TAKES_SIZES = (functional.pad, Tensor.__getitem__)
_OF_SIZES = (torch.arange,)
"""Functions that take sizes after a tensor, and those that take nothing else."""


class SizesInTensors(TorchFunctionMode):
    """Knows the values of tensors of one number in a trace, and puts sizes in their place.

    Args:
        model: which is to be traced, with its data.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._kept = [
            (module, name, int(buffer))
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            # Persistent ones change, as the number of batches that a normalization counts.
            if _is_whole(buffer) and not is_persistent(module, name)
        ]
        self._sizes: dict[int, tuple[Tensor, Quotient]] = {}
        self._truths: dict[int, tuple[Tensor, Any]] = {}
        self._tables: dict[int, tuple[Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and id(args[0]) in self._truths:
            return bool(self._truths[id(args[0])][1])
        args = self._with_sizes(func, args)
        result = func(*args, **(kwargs or {}))
        self._follow(func, args, kwargs or {}, result)
        return result

    def _with_sizes(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of `func` with sizes in the place of tensors, where it takes sizes."""
        if func not in (*_TAKES_SIZES, *_OF_SIZES):
            return args

        def size(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(size(value.start), size(value.stop), size(value.step))
            known = self._of(value) if isinstance(value, Tensor) else None
            return value if known is None or known[1] != 1 else known[0]

        first = 0 if func in _OF_SIZES else 1
        return (*args[:first], *pytree.tree_map(size, args[first:]))

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what `result` of `func` is, if it is made of what is known."""
        if func is torch.tensor and isinstance(args[0], (list, tuple)) and not result.is_floating_point():
            self._tables[id(result)] = result, args[0]
        elif func is Tensor.__getitem__ and id(args[0]) in self._tables:
            self._take(self._tables[id(args[0])][1], args[1], result)
        if not isinstance(result, Tensor) or result.dim() or kwargs:
            return
        if func in _OF_TWO or func in _COMPARE:
            one, other = (self._of(arg) for arg in args[:2])
            if one is None or other is None:
                return
            if func in _COMPARE:
                self._truths[id(result)] = result, _COMPARE[func](one[0] * other[1], other[0] * one[1])
            elif (size := _OF_TWO[func](one, other)) is not None:
                self._sizes[id(result)] = result, size
        elif (func in _CEIL or func is Tensor.to) and (known := self._of(args[0])) is not None:
            numerator, divisor = known
            if func in _CEIL:
                self._sizes[id(result)] = result, (-(-numerator // divisor), 1)
            elif divisor == 1 and not result.is_floating_point():
                self._sizes[id(result)] = result, known

    def _take(self, table: Any, index: Any, result: Tensor) -> None:
        """Note what is at an index of a table of sizes."""
        for each in index if isinstance(index, tuple) else (index,):
            if type(each) is not int or not isinstance(table, (list, tuple)):
                return
            table = table[each]
        if isinstance(table, (list, tuple)):
            self._tables[id(result)] = result, table
        elif (size := self._of(table)) is not None:
            self._sizes[id(result)] = result, size

    def _of(self, value: Any) -> Quotient | None:
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return value, 1
        if not isinstance(value, Tensor) or value.dim():
            return None
        if id(value) in self._sizes:
            return self._sizes[id(value)][1]
        for module, name, number in self._kept:
            if buffers_of(module).get(name) is value:
                return number, 1
        if not isinstance(value, (FakeTensor, FunctionalTensor)) and _is_whole(value):
            with disable_current_modes():
                return int(value), 1
        return None


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.dim() and not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_meta


QUIRK = Quirk(after_undecided, lambda model, call: SizesInTensors(model))
