"""Let grouped-query attention read the heads of keys and values where they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.queries import is_on_cpu
from ..pipeline import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupHeads(GraphPass):
    """Replace `attention(q, repeated k, repeated v)` by the operator's own grouping, `enable_gqa`.

    Models repeat each head of keys and values for the queries that share it; attention then reads copies, and keeps
    them for the backward pass. Safe because this is how the operator defines `enable_gqa`. On the CPU alone: there its
    fast kernel groups heads under any mask, and elsewhere it may have to take a slow one.
    """

    def run(self, gm: fx.GraphModule) -> int:
        if not is_on_cpu(gm):
            return 0
        edits = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            q, *repeated = node.args[:3]
            heads = [_repeated(operand) for operand in repeated]
            (k, times), (v, also) = heads
            if times > 1 and times == also and not node.kwargs.get("enable_gqa"):
                node.args = (q, k, v, *node.args[3:])
                node.update_kwarg("enable_gqa", True)
                edits += 1
        return edits


def _repeated(node: Any) -> tuple[fx.Node, int]:
    """What `node` repeats along its heads `(batch, heads, length, size)`, each one so many times; itself, once, if not.

    It does so by an expanded new dimension after the heads, which is then made one with them.
    """
    if node.target is aten.reshape.default:
        expanded, shape = node.args
        if expanded.target is aten.expand.default and len(expanded.args[1]) == 5:
            batch, heads, times, *rest = expanded.args[1]
            whole = _whole(expanded.args[0])
            known = isinstance(heads, int) and isinstance(times, int) and heads > 0
            if known and list(shape) == [batch, heads * times, *rest] and whole.target is aten.unsqueeze.default:
                x, dim = whole.args
                if dim == 2:
                    return _whole(x), times
    return node, 1


def _whole(node: Any) -> Any:
    """What `node` is a slice of, from end to end."""
    while node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize):
        node = node.args[0]
    return node
