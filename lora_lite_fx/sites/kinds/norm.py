"""The factors of norms as sites. A norm is one operator, or written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...errors import ConfigError
from ...graph.insertion import is_size, replaced_tensor
from ..dataflow import CASTS, op_name
from ..matching import Call, Dialect, FrozenReader, FrozenTensor, Match
from .site_input import SiteInput
from .site_kind import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm(SiteKind):
    """A norm: `y = n(x) * w + b`. It counts as a linear with `W (channels, 1)`, whose input is never formed.

    A variant can call it with another weight and bias, and no more. That leaves the nodes of the norm as they are,
    whatever they compute. So `multiply` is a stand-in, which no graph has.
    """

    name: ClassVar[str] = "norm"
    article: ClassVar[str] = "a norm"
    replaced_only: ClassVar[bool] = True
    why: ClassVar[str] = "a norm has no matrix; only a variant that replaces its weight and bias, as Full does, fits"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1, 1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return (d_out,)

    def factor(self, stored: Tensor) -> Tensor:
        return stored.sum()

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return x * factor

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return stored.new_empty(2, 3, stored.numel()), (2,)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, x.dtype, who)

    def _refuse(self, x: SiteInput, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{x.who}, which is {self.article}: {self.why}.")

    cast = dropout = linear = _refuse


_POSITIONS: dict[object, int] = {  # of the weight among the arguments; the bias comes next
    aten.layer_norm.default: 2,
    aten.rms_norm.default: 2,
    aten.group_norm.default: 2,
    aten.batch_norm.default: 1,
    aten.instance_norm.default: 1,
}


def _norm(reader: FrozenReader, node: fx.Node) -> Match | None:
    """Return the match of the weight of a norm. The `x` of one that is written out is what the weight multiplies."""
    args: tuple[Any, ...] = node.args
    if node.target in _POSITIONS:
        at = _POSITIONS[node.target]
        weight, bias = (_vector(reader, value) for value in (*args[at : at + 2], None, None)[:2])
        bias = None if node.target is aten.rms_norm.default else bias
        return None if weight is None else Match(Call(args[0], node, node), weight, Norm(), bias)
    for factor, x in (args, args[::-1]) if len(args) == 2 else ():
        if isinstance(x, fx.Node) and x not in reader.frozen and _is_normalized(x):
            weight = _vector(reader, factor)
            return None if weight is None else Match(Call(x, node, node), weight, Norm())
    return None


def _is_normalized(x: fx.Node) -> bool:
    """Check whether `x` is something divided by a root, such as `h * rsqrt(mean(h ** 2) + eps)`, perhaps cast."""
    x = _uncast(x)
    if op_name(x) not in ("mul", "div"):
        return False
    roots = ("rsqrt",) if op_name(x) == "mul" else ("sqrt", "linalg_vector_norm")
    return any(op_name(_uncast(operand)) in roots for operand in x.all_input_nodes)


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _vector(reader: FrozenReader, node: object) -> FrozenTensor | None:
    """Return the one parameter of one dimension that `node` is computed from, as `1 + w`; else None."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        read = [operand for operand in node.all_input_nodes if not is_size(operand)]
        node = replaced_tensor(node) or (read[0] if len(read) == 1 else None)
    return reader.parameter(node, dim=1) if isinstance(node, fx.Node) and node.op == "get_attr" else None


NORM = Dialect((*_POSITIONS, aten.mul.Tensor), _norm, (Norm,))
