"""Stacks of experts as sites."""

from __future__ import annotations

import operator as operators
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...compat.torch import GROUPED_MM
from ..dataflow import op_name
from ..matching import Dialect, FrozenReader, Match
from .expert_values import PerExpert, Routed
from .site_kind import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Experts(SiteKind):
    """Experts whose weights are one parameter.

    Args:
        operator: the operator that multiplies. It is `bmm` or `matmul` with one batch for each expert, or a grouped
            product, whose input has the tokens sorted by expert and which also takes the end of each expert's tokens.
    """

    operator: Any = None

    name: ClassVar[str] = "experts"
    article: ClassVar[str] = "a stack of experts"
    is_stack: ClassVar[bool] = True
    value_type: ClassVar[type] = Routed

    @property
    def routed(self) -> bool:
        """Tell whether the tokens are sorted by expert, instead of one batch for each expert."""
        return "grouped_mm" in str(self.operator)

    def factor(self, stored: Tensor) -> Tensor:
        return self.matrix(stored).mT

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        d_in = self.matrix(stored).shape[-1]
        return (stored.new_empty(5, d_in), (1,)) if self.routed else (stored.new_empty(len(stored), 3, d_in), (0, 2))

    def example_routing(self, x: Tensor, experts: int) -> tuple[Tensor, ...]:
        return (torch.empty(experts, dtype=torch.int32, device=x.device),) if self.routed else ()

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        product: Tensor = self.operator(x, factor, *routing)
        return product

    def times(self, x: Tensor, matrix: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """Return the product with another `matrix (experts, m, d_in)`, in the dtype of `x`."""
        if self.operator is not GROUPED_MM:
            return self.multiply(x, matrix.mT, *routing)
        # PyTorch's own operator takes bfloat16 only, in rows of whole 16 bytes. The tensors may be wider, as under
        # autocast.
        m, d_in = matrix.shape[1:]
        padded = F.pad(matrix.bfloat16(), (0, -d_in % 8, 0, -m % 8))
        y = self.multiply(F.pad(x.bfloat16(), (0, -d_in % 8)), padded.mT, *routing)
        return y[..., :m].to(x.dtype)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Routed:
        return Routed(x, self, routing, f"{who}, which is a stack of experts")

    def operand(self, tensor: Tensor, who: str) -> PerExpert:
        return PerExpert(tensor, f"{who}, which is a stack of experts")

    def result(self, y: Tensor, x: Any) -> Routed:
        replaced: Routed = x.replaced(y)
        return replaced

    def leave(self, y: Any) -> Tensor:
        output: Tensor = y.value
        return output

    def spread(self, tensor: Tensor, x: Tensor, routing: tuple[Tensor, ...]) -> Tensor:
        """Return `tensor (experts, ...)` for each token of `x`, in the shape that meets `x` elementwise."""
        if not self.routed:
            return tensor.unsqueeze(1)
        (ends,) = routing
        tokens = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
        # Tokens after the last end belong to no expert. They get any expert, because nothing reads their outputs.
        expert = torch.searchsorted(ends, tokens, right=True).clamp_max(tensor.shape[0] - 1)
        return tensor[expert]


GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""The plain names of grouped products."""


def _experts(reader: FrozenReader, node: fx.Node) -> Match | None:
    operands: list[Any] = [operand for operand in (*node.args, *node.kwargs.values()) if operand is not None]
    x, weight, *routing = operands
    stack = reader.parameter(weight, dim=3)
    known = isinstance(x, fx.Node) and all("val" in getattr(operand, "meta", ()) for operand in routing)
    if stack is None or stack.rows or not known or len(routing) != (op_name(node) in GROUPED):
        return None
    call = replace(reader.between_reshapes(x, node, all_dimensions=True), routing=tuple(routing))
    return Match(call, stack, Experts(transposed=not stack.flipped, operator=node.target))


EXPERTS = Dialect(
    (*GROUPED, aten.matmul.default, aten.mm.default, operators.matmul, aten.bmm.default), _experts, (Experts,)
)
