"""Let grouped-query attention read the heads of keys and values without copies."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.queries import is_on_cpu
from ..pipeline import Declined, GraphPass, Outcome

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupHeads(GraphPass):
    """Replace `attention(q, repeated k, repeated v)` by the operator's own grouping, `enable_gqa`.

    Models repeat each head of keys and values for the queries that share it. Attention then reads copies, and keeps
    them for the backward pass. Safe because this is how the operator defines `enable_gqa`. The pass runs on the CPU
    alone, where the fast kernel groups heads under any mask; on other devices the operator may have to take a slow one.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        on_cpu = is_on_cpu(gm)
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            q, *repeated = node.args[:3]
            (k, times_of_k), (v, times_of_v) = map(_repeated, repeated)
            if times_of_k == times_of_v == 1:
                continue
            if not on_cpu:
                declined.append(Declined.at([node], "not on the CPU"))
            elif times_of_k != times_of_v:
                declined.append(Declined.at([node], "keys and values are repeated differently"))
            elif node.kwargs.get("enable_gqa"):
                declined.append(Declined.at([node], "heads are grouped already"))
            else:
                node.args = (q, k, v, *node.args[3:])
                node.update_kwarg("enable_gqa", True)
                edits += 1
        return Outcome(edits, tuple(declined))


def _repeated(node: Any) -> tuple[fx.Node, int]:
    """Return the value whose heads `node` repeats, and how many times; `node` itself and 1 if it repeats none.

    A repetition of the heads of `(batch, heads, length, size)` is a new dimension after the heads, expanded, and then
    joined with them by a reshape.
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
    """Return the value that `node` is a slice of, if the slice goes from end to end; else `node`."""
    while node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize):
        node = node.args[0]
    return node
