"""Record what functions a run on tensors without data calls with which numbers, and what it compares sizes with.

A model may compare a size with a number, and a graph holds for those sizes alone for which the answer is the same. The
operators of a run do not show that. Nor do they show numbers without effect in its mode, such as the probability of a
dropout in evaluation, which a graph has all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHAPE: Any = Tensor.shape
READ_SIZES = frozenset((_SHAPE.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__))
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")


class MadeContiguous(NamedTuple):
    """A call that asks for a contiguous tensor.

    Args:
        arguments: a key for those that are no tensors.
        acts: whether the tensor was not contiguous before. A graph lacks the calls that have nothing to do.
    """

    arguments: object
    acts: bool


class WatchedFunctions(TorchFunctionMode):
    """Records functions of torch, and hands out sizes that record comparisons, as do sums and products of them.

    Args:
        record: gets a description of each function and comparison.
    """

    def __init__(self, record: Callable[[Hashable], None]) -> None:
        super().__init__()
        self._record = record
        kinds: dict[type, Any] = {}
        kinds |= {base: _watched(base, kinds, record) for base in (int, float)}
        self._size = kinds[int]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.contiguous:
            self._record(MadeContiguous(literals((args, kwargs)), result is not args[0]))
            return result
        if func not in READ_SIZES:
            self._record((getattr(func, "__name__", str(func)), literals((args, kwargs))))
            return result
        if isinstance(result, torch.Size):
            return torch.Size(self._size(size) if type(size) is int else size for size in result)
        return self._size(result) if type(result) is int else result


def literals(value: Any) -> Hashable:
    """Return a key for what is no tensor in the arguments of a call."""
    if isinstance(value, (tuple, list)):  # before tensors, of which it takes longer to ask
        return tuple(map(literals, value))
    if isinstance(value, dict):
        return tuple([(key, literals(item)) for key, item in value.items()])
    return "tensor" if isinstance(value, Tensor) else literal(value)


def literal(value: Any) -> Hashable:
    """Return a key that tells numbers of different types apart, and a negative zero from zero."""
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind.__name__, kind.__repr__(value)
    return repr(value)


def _watched(base: Any, kinds: dict[type, Any], record: Callable[[Hashable], None]) -> Any:
    """Return a class of numbers like `base` that records comparisons.

    Args:
        base: int or float.
        kinds: the class for the results of arithmetic of each type; it is filled later.
        record: as for `WatchedFunctions`.
    """

    def comparison(name: str) -> Callable[[Any, Any], Any]:
        def compare(self: Any, other: Any) -> Any:
            result = getattr(base, name)(self, other)
            record((name, literal(self), literals(other), result))
            return result

        return compare

    def arithmetic(name: str) -> Callable[..., Any]:
        def compute(self: Any, *others: Any) -> Any:
            result = getattr(base, name)(self, *others)
            if result is NotImplemented and others and isinstance(others[0], float):  # an int leaves these to float
                result = getattr(float, name)(float(self), *others)
            return kinds[type(result)](result) if type(result) in kinds else result

        return compute

    def truth(self: Any) -> bool:
        result = base(self) != 0
        record(("is not zero", literal(self), result))
        return bool(result)

    methods: dict[str, Any] = {f"__{name}__": comparison(f"__{name}__") for name in _COMPARISONS}
    for name in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), "neg", "abs"):
        methods[f"__{name}__"] = arithmetic(f"__{name}__")
    return type(f"Watched{base.__name__.title()}", (base,), {**methods, "__bool__": truth, "__hash__": base.__hash__})
