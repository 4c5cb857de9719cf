"""Linears as sites, and the ways in which a graph writes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ..matching import Call, Dialect, FrozenReader, Match
from .site_kind import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear(SiteKind):
    """A linear over the last dimension: `y = x W^T + b`."""

    name: ClassVar[str] = "linear"
    article: ClassVar[str] = "a linear"
    has_roles: ClassVar[bool] = True
    vector_dims: ClassVar[int] = 1
    token_dim: ClassVar[int | None] = 0
    other_ranks: ClassVar[tuple[int, ...]] = (-1, 1)


def _linear(reader: FrozenReader, node: fx.Node) -> Match | None:
    args: tuple[Any, ...] = node.args
    x, weight, bias = (*args, None)[:3]
    return _matched(reader, Call(x, node, node), weight, bias, out_in=True)


def _addmm(reader: FrozenReader, node: fx.Node) -> Match | None:
    """Return the match of GPT-2's `Conv1D`."""
    if node.kwargs:
        return None
    bias, x, weight = node.args
    return _matched(reader, reader.between_reshapes(x, node), weight, bias, out_in=False)  # type: ignore[arg-type]


def _matmul(reader: FrozenReader, node: fx.Node) -> Match | None:
    """Return the match of `x @ W`, perhaps with the addition of a bias vector, if nothing else reads the product."""
    args: tuple[Any, ...] = node.args
    if node.kwargs or reader.tensor(args[1], 2, node) is None:
        return None
    call, bias = reader.between_reshapes(args[0], node), None
    users = list(call.y.users)
    if len(users) == 1 and users[0].target in (aten.add.Tensor, operator.add):
        others = [operand for operand in users[0].args if operand is not call.y]
        if len(others) == 1 and isinstance(others[0], fx.Node) and reader.parameter(others[0], dim=1):
            call, bias = replace(call, y=users[0]), others[0]
    return _matched(reader, call, args[1], bias, out_in=False)


def _matched(reader: FrozenReader, call: Call, weight: object, bias: object, out_in: bool) -> Match | None:
    """Return the match of a product that reads its weight as `(d_out, d_in)`, or as the transpose."""
    matrix = reader.tensor(weight, 2, call.node)
    vector = reader.tensor(bias, 1, call.node) if bias is not None else None
    if matrix is None or (bias is not None and vector is None):
        return None
    return Match(call, matrix, Linear(out_in == matrix.flipped, matrix.rows), vector)


LINEAR = Dialect((aten.linear.default,), _linear, (Linear,))
ADDMM = Dialect((aten.addmm.default,), _addmm, (Linear,))
MATMUL = Dialect((aten.matmul.default, aten.mm.default, operator.matmul, aten.bmm.default), _matmul, (Linear,))
