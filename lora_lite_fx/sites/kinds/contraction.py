"""Linears that are written as `einsum`, with a weight of any number of dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from ..matching import Call, Dialect, FrozenReader, Match
from .linear import Linear


@dataclass(frozen=True)
class Contraction(Linear):
    """A linear from the last dimensions of `x` to the last dimensions of `y`, such as `einsum("bsd,dhk->bshk", x, W)`.

    A variant sees these dimensions as one: `d_in` is the product of the sizes that are summed over, `d_out` of those
    that only the weight and the output have.

    Args:
        order: the dimensions of the stored weight in the order outputs, inputs.
        outputs, inputs: the sizes of the two groups.
        equation: the equation of `x` and the weight, in this order.
    """

    order: tuple[int, ...] = (0, 1)
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    equation: str = "...i,oi->...o"

    article: ClassVar[str] = "a linear over several dimensions"

    @property
    def vector_dims(self) -> int:  # type: ignore[override]
        return len(self.inputs)

    def is_named_after(self, parameter: str) -> bool:
        return parameter != "weight"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.permute(self.order).reshape(math.prod(self.outputs), math.prod(self.inputs))

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrix.reshape(*self.outputs, *self.inputs).permute(back).contiguous()

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        sizes = (*self.outputs, *self.inputs)
        return tuple(sizes[self.order.index(dim)] for dim in range(len(self.order)))

    def bias(self, bias: Tensor) -> Tensor:
        return bias.reshape(self.outputs)

    def factor(self, stored: Tensor) -> Tensor:
        return stored

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, factor)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        fixed = range(2, 2 + len(self.inputs))
        return stored.new_empty(2, 3, *self.inputs), tuple(fixed)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Tensor:
        return x if len(self.inputs) == 1 else x.flatten(-len(self.inputs))

    def as_in_model(self, entered: Any) -> Tensor:
        x: Tensor = entered
        return x if len(self.inputs) == 1 else x.unflatten(-1, self.inputs)

    def result(self, y: Tensor, x: Any) -> Tensor:
        return y if len(self.outputs) == 1 else y.flatten(-len(self.outputs))

    def leave(self, y: Tensor) -> Tensor:
        return y if len(self.outputs) == 1 else y.unflatten(-1, self.outputs)


def contraction(equation: str, weight_first: bool, sizes: tuple[int, ...]) -> Contraction | str:
    """Return the kind that an equation of an input and a weight of these `sizes` makes; or why it is not a linear.

    Args:
        equation: as `torch.einsum` takes it.
        weight_first: whether the weight is its first operand.
        sizes: of the weight.
    """
    terms, arrow, y = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2:
        return f"the equation {equation!r} is not of two operands and an output"
    weight, x = operands if weight_first else operands[::-1]
    letters = (x.replace("...", ""), weight, y.replace("...", ""))
    if "." in weight or any(len(set(term)) != len(term) for term in letters) or len(weight) != len(sizes):
        return f"the equation {equation!r} repeats an index, or has none for a dimension of the weight"
    inputs = "".join(index for index in x if index in weight and index not in y)
    outputs = "".join(index for index in y if index in weight and index not in x)
    if set(weight) != {*inputs, *outputs} or not inputs or not outputs:
        return f"in the equation {equation!r} an index is in input, weight and output, or in one of them alone"
    rest = x.removesuffix(inputs)
    if x != rest + inputs or y != rest + outputs or set(rest) & set(weight):
        return f"the equation {equation!r} is not over the last dimensions"
    order = tuple(weight.index(index) for index in outputs + inputs)
    return Contraction(
        order=order,
        outputs=tuple(sizes[weight.index(index)] for index in outputs),
        inputs=tuple(sizes[weight.index(index)] for index in inputs),
        equation=f"...{inputs},{weight}->...{outputs}",
    )


def _einsum(reader: FrozenReader, node: fx.Node) -> Match | None:
    equation, operands, *_ = cast(tuple[str, list[fx.Node]], node.args)
    for operand, x in (operands, operands[::-1]) if len(operands) == 2 else ():
        weight = next((t for dim in (2, 3, 4) if (t := reader.tensor(operand, dim, node, exact=True))), None)
        if weight is not None:
            kind = contraction(equation, operand is operands[0], tuple(weight.shape))
            return None if isinstance(kind, str) else Match(Call(x, node, node), weight, kind)
    return None


EINSUM = Dialect((torch.ops.aten.einsum.default,), _einsum, (Contraction,))
