"""Experts: a product with a matrix for each, `W (experts, d_out, d_in)`, and an adapter for each.

A variant is written for one linear. Here its input and tensors are objects that know what belongs to an expert:
`PerExpert` tensors have a leading dimension of experts that the variant does not see; a `Routed` value has a row for
each token at its expert. What is computed of the two follows from which is which.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from .linear import SiteKind


@dataclass(frozen=True)
class Experts(SiteKind):
    """Experts whose weights are one parameter, with an adapter for each.

    Args:
        operator: what multiplies: `bmm` or `matmul` with one batch for each expert, or a grouped product, whose
            input has the tokens sorted by expert and which takes the end of each expert's tokens as well.
    """

    operator: Any = None

    name: ClassVar[str] = "experts"
    article: ClassVar[str] = "a stack of experts"

    @property
    def routed(self) -> bool:
        """Whether tokens are sorted by expert, and not one batch for each."""
        return "grouped_mm" in str(self.operator)

    def factor(self, stored: Tensor) -> Tensor:
        return self.matrix(stored).mT

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        d_in = self.matrix(stored).shape[-1]
        return (stored.new_empty(5, d_in), (1,)) if self.routed else (stored.new_empty(len(stored), 3, d_in), (0, 2))

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return self.operator(x, factor, *routing)

    def times(self, x: Tensor, matrix: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """The product with another `matrix (experts, m, d_in)`, in the dtype of `x`."""
        if self.operator is not torch.ops.aten._grouped_mm.default:
            return self.multiply(x, matrix.mT, *routing)
        # PyTorch's own takes bfloat16 in rows of whole 16 bytes. As under autocast, the tensors may be wider.
        m, d_in = matrix.shape[1:]
        padded = F.pad(matrix.bfloat16(), (0, -d_in % 8, 0, -m % 8))
        y = self.multiply(F.pad(x.bfloat16(), (0, -d_in % 8)), padded.mT, *routing)
        return y[..., :m].to(x.dtype)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Routed:
        return Routed(x, self, routing, who)

    def result(self, y: Tensor, x: Any) -> Routed:
        return Routed(y, self, x.routing, x.who)

    def leave(self, y: Any) -> Tensor:
        return y.value

    def spread(self, tensor: Tensor, x: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """`tensor (experts, ...)` for each token of `x`, so that it meets it elementwise."""
        if not self.routed:
            return tensor.unsqueeze(1)
        (ends,) = routing
        tokens = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
        # Tokens after the last end belong to no expert, and nobody reads what is computed for them.
        expert = torch.searchsorted(ends, tokens, right=True).clamp_max(tensor.shape[0] - 1)
        return tensor[expert]


class _Value:
    """What `Routed` and `PerExpert` have in common: the operators and methods of a tensor."""

    value: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def mT(self) -> Any:
        return _apply(Tensor.t, (self,), {})

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(_method, getattr(Tensor, name), self)

    def __getitem__(self, index: Any) -> Any:
        return _apply(operator.getitem, (self, index), {})

    def __neg__(self) -> Any:
        return _apply(operator.neg, (self,), {})


def _method(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _apply(func, args, kwargs)


def _operators() -> None:
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
        func = getattr(operator, name)
        setattr(_Value, f"__{name}__", lambda self, other, func=func: _apply(func, (self, other), {}))
        setattr(_Value, f"__r{name}__", lambda self, other, func=func: _apply(func, (other, self), {}))


_operators()


class PerExpert(_Value):
    """A tensor for each expert, `value (experts, ...)`."""

    def __init__(self, value: Tensor, who: str) -> None:
        self.value, self.who = value, who

    @property
    def shape(self) -> torch.Size:
        """Of one expert's."""
        return self.value.shape[1:]


class Routed(_Value):
    """Values of tokens at their experts: `value (tokens, d)` sorted by expert, or `(experts, tokens, d)`."""

    def __init__(self, value: Tensor, kind: Experts, routing: tuple[Tensor, ...], who: str) -> None:
        self.value, self.kind, self.routing, self.who = value, kind, routing, who


# Functions that act on each element, whatever their operands.
_ELEMENTWISE = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "pow",
        "neg",
        "to",
        "type_as",
        "float",
        "double",
        "detach",
        "square",
        "sqrt",
    }
    | {"clamp_min", "cos", "sin", "tanh", "dropout"}
)
# Functions that name dimensions, by position or as `dim` only.
_BY_POSITION = frozenset({"sum", "flatten"})
_BY_NAME = frozenset({"norm", "vector_norm", "linalg_vector_norm"})


def _apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func.__name__.strip("_")
    routed = next((arg for arg in args if isinstance(arg, Routed)), None)
    if routed is not None:
        value = _of_routed(func, name, routed, args, kwargs)
        if value is not None:
            return Routed(value, routed.kind, routed.routing, routed.who)
    else:
        value = _of_experts(func, name, args, kwargs)
        if value is not None:
            return PerExpert(value, next(arg for arg in args if isinstance(arg, PerExpert)).who)
    who = next(arg for arg in args if isinstance(arg, _Value)).who
    raise ConfigError(
        f"{who}, which is a stack of experts: {name} is not known of values that belong to several experts."
    )


def _of_routed(
    func: Callable[..., Any], name: str, routed: Routed, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    kind, routing = routed.kind, routed.routing

    def meet(operand: Any) -> Any:
        if isinstance(operand, PerExpert):
            return kind.spread(operand.value, routed.value, routing)
        return operand.value if isinstance(operand, Routed) else operand

    if name == "linear" and args[0] is routed:
        x, matrix, bias = (*args, kwargs.get("bias"))[:3]
        y = kind.times(x.value, matrix.value, routing) if isinstance(matrix, PerExpert) else F.linear(x.value, matrix)
        return y if bias is None else y + meet(bias)
    if name in _ELEMENTWISE and all(len(arg.shape) <= 1 for arg in args if isinstance(arg, (PerExpert, Tensor))):
        return func(*map(meet, args), **kwargs)
    return None


def _of_experts(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    first = args[0].value if isinstance(args[0], PerExpert) else None
    values = [arg.value if isinstance(arg, PerExpert) else arg for arg in args]
    if name in _ELEMENTWISE:
        # Dimensions are aligned from the last, but for that of the experts, which is first.
        rank = max(len(arg.shape) for arg in args if isinstance(arg, (PerExpert, Tensor)))
        lifted = [
            value[(slice(None), *[None] * (rank - len(arg.shape)))] if isinstance(arg, PerExpert) else value
            for arg, value in zip(args, values, strict=True)
        ]
        return func(*lifted, **kwargs)
    if first is None:
        return None
    if name in ("linear", "matmul") and len(args) == 2 and first.dim() == 3:
        second = args[1]
        other = second.value if isinstance(second, PerExpert) else second
        return first @ (other.mT if name == "linear" else other)
    if name == "t" and first.dim() == 3:
        return first.mT
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return first[(slice(None), *index)]
    if (name in _BY_POSITION and len(args) > 1 and not kwargs) or (name in _BY_NAME and "dim" in kwargs):
        dimensions = (dim + (dim >= 0) for dim in args[1:])
        named = {key: value + (value >= 0) if key == "dim" else value for key, value in kwargs.items()}
        return func(first, *dimensions, **named)
    return None
