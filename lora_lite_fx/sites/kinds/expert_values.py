"""Values of several experts: the objects that a variant gets instead of tensors at a stack of experts, or in a bank.

A variant is written for one linear. With these objects it computes as if there were one expert; or one slot of a bank,
where the rows of the batch take the place of tokens:

- `PerExpert`: a tensor for each expert, as are the frozen weight and the adapter's tensors. The variant does not see
  the first dimension, which counts the experts.
- `Routed`: a row for each token, computed by the expert of that token, as are the input and the output.

Every function that the variant calls arrives in `_apply`, which looks up a rule for it. A function without a rule is a
`ConfigError`, so a variant is either right for all experts or refused.

The rules are found by the name of the function because one function arrives as several objects: `torch.mul`,
`Tensor.mul`, `Tensor.__mul__` and `operator.mul` have nothing but their name in common. `torch.vmap` over the experts
would need no rules, but it does not work here. Tracing before dispatch, as `torch.export` does, records the values
inside `vmap` as constants, so the graph would be wrong without an error. A grouped product also has another number of
tokens for each expert, so there is no batch to map over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError


class _Value:
    """A value of several experts. It has the operators and methods of a tensor, which all lead to `_apply`."""

    value: Tensor
    who: str

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def mT(self) -> Any:
        return _apply(Tensor.t, self)

    T = mT

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(Tensor, name)
        return partial(_apply, method, self) if callable(method) else self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        """Raise the error for a function without a rule."""
        raise ConfigError(f"{self.who}: {name} is not known of values that belong to several experts or adapters.")

    def __getitem__(self, index: Any) -> Any:
        return _apply(operator.getitem, self, index)

    def __neg__(self) -> Any:
        return _apply(operator.neg, self)

    # A product goes through torch, so that modes see it as they see that of tensors.

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]


def _give_operators() -> None:
    """Give `_Value` the arithmetic of a tensor."""
    for name in ("add", "sub", "mul", "truediv", "pow"):
        func = getattr(operator, name)
        setattr(_Value, f"__{name}__", lambda self, other, func=func: _apply(func, self, other))
        setattr(_Value, f"__r{name}__", lambda self, other, func=func: _apply(func, other, self))


_give_operators()


class PerExpert(_Value):
    """A tensor for each expert, `value (experts, ...)`. `who` names the variant and the site in errors.

    A value that is the same for all experts may have 1 as its first dimension.
    """

    def __init__(self, value: Tensor, who: str) -> None:
        self.value, self.who = value, who

    @property
    def shape(self) -> torch.Size:
        """The shape of one expert's tensor."""
        return self.value.shape[1:]

    def dim(self) -> int:
        """Return the number of dimensions of one expert's tensor."""
        return self.value.dim() - 1


class Routed(_Value):
    """Values of tokens at their experts: `value (tokens, d)` sorted by expert, or `(experts, tokens, d)`."""

    def __init__(self, value: Tensor, kind: Any, routing: tuple[Tensor, ...], who: str) -> None:
        self.value, self.kind, self.routing, self.who = value, kind, routing, who

    def replaced(self, value: Tensor) -> Routed:
        """Return another value of the same tokens."""
        return Routed(value, self.kind, self.routing, self.who)

    def spread(self, operand: Any) -> Any:
        """Return `operand` as it meets the tokens elementwise: of a `PerExpert`, that of the expert of each token."""
        if isinstance(operand, PerExpert):
            return self.kind.spread(operand.value, self.value, self.routing)
        return operand.value if isinstance(operand, Routed) else operand


def _apply(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute `func` of values of several experts, by the rule for its name.

    Raises:
        ConfigError: there is no rule for `func`, or none for these arguments.
    """
    name = func.__name__.strip("_")
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, _Value)]
    routed = next((value for value in values if isinstance(value, Routed)), None)
    rule = (_RULES if routed is None else _ROUTED_RULES).get(name)
    if any(isinstance(value, _Value) for key, value in kwargs.items() if key != "bias"):
        rule = None  # the rules look for values among the positional arguments
    result = rule(func, *args, **kwargs) if rule is not None else None
    if result is None:
        values[0]._refuse(name)
    return PerExpert(result, values[0].who) if routed is None else routed.replaced(result)


# A rule takes the function and its arguments, and returns the tensor for all experts, or None to refuse the arguments.
_Rule = Callable[..., Tensor | None]


# Rules for functions of `PerExpert` values and plain tensors.


def _elementwise(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    rank = max(arg.dim() for arg in args if isinstance(arg, (PerExpert, Tensor)))

    def aligned(arg: Any) -> Any:
        # Dimensions are aligned from the last. That of the experts is the first, so ones go in after it.
        return arg.value[(slice(None), *[None] * (rank - arg.dim()))] if isinstance(arg, PerExpert) else arg

    return func(*map(aligned, args), **kwargs)


def _matmul(func: Callable[..., Tensor], first: Any, second: Any) -> Tensor | None:
    if not _is_matrix(first) or second.dim() > 2 or (isinstance(second, PerExpert) and second.dim() < 2):
        return None
    product: Tensor = first.value @ (second.value if isinstance(second, PerExpert) else second)
    return product


def _linear(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    return _matmul(func, args[0], args[1].mT) if len(args) == 2 and not kwargs and args[1].dim() == 2 else None


def _transpose(func: Callable[..., Tensor], matrix: PerExpert) -> Tensor | None:
    return matrix.value.mT if _is_matrix(matrix) else None


def _index(func: Callable[..., Tensor], value: Any, index: Any) -> Tensor | None:
    every = (slice(None), *(index if isinstance(index, tuple) else (index,)))
    return value.value[every] if isinstance(value, PerExpert) else None


def _along_positions(func: Callable[..., Tensor], value: PerExpert, *dims: Any, **kwargs: Any) -> Tensor | None:
    """Shift the dimensions given by position; without one the function would join the experts."""
    if not dims or kwargs or not all(type(dim) is int for dim in dims):
        return None
    return func(value.value, *map(_shifted, dims))


def _along_dim(func: Callable[..., Tensor], value: PerExpert, *args: Any, **kwargs: Any) -> Tensor | None:
    """Shift the dimension given as `dim`; without it the function would join the experts."""
    if type(kwargs.get("dim")) is not int:
        return None
    return func(value.value, *args, **{**kwargs, "dim": _shifted(kwargs["dim"])})


def _shifted(dim: int) -> int:
    """Return a dimension of one expert's tensor as a dimension of the tensor for all."""
    return dim + 1 if dim >= 0 else dim


def _is_matrix(value: Any) -> bool:
    return isinstance(value, PerExpert) and value.dim() == 2


# Rules for functions with at least one `Routed` value.


def _routed_elementwise(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    if any(arg.dim() > 1 for arg in args if isinstance(arg, (PerExpert, Tensor))):
        return None
    routed = next(arg for arg in args if isinstance(arg, Routed))
    return func(*map(routed.spread, args), **kwargs)


def _routed_linear(func: Callable[..., Tensor], x: Any, matrix: Any, bias: Any = None) -> Tensor | None:
    if not isinstance(x, Routed):
        return None
    y = x.kind.times(x.value, matrix.value, x.routing) if isinstance(matrix, PerExpert) else F.linear(x.value, matrix)
    return y if bias is None else y + x.spread(bias)


def _routed_matmul(func: Callable[..., Tensor], x: Any, matrix: Any) -> Tensor | None:
    is_matrix = isinstance(matrix, (PerExpert, Tensor)) and matrix.dim() == 2
    return _routed_linear(func, x, matrix.mT) if is_matrix else None


# fmt: off
_ELEMENTWISE = (
    "add", "sub", "mul", "div", "truediv", "pow", "neg", "square", "sqrt", "clamp_min", "cos", "sin", "tanh",
    "to", "type_as", "float", "double", "detach", "dropout",
)
# fmt: on
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "linear": _linear,
    "matmul": _matmul,
    "t": _transpose,
    "getitem": _index,
    **dict.fromkeys(("sum", "flatten"), _along_positions),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm"), _along_dim),
}
_ROUTED_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _routed_elementwise),
    "linear": _routed_linear,
    "matmul": _routed_matmul,
}
