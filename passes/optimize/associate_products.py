"""Multiply the small matrices of adapters first, where that leaves less to do for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...graph.parameter_work import parameter_work
from ...graph.provenance import SHARED, record, recorded
from ...graph.queries import is_product, value_of
from ..pipeline import GraphPass, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class AssociateProducts(GraphPass):
    """Make `x (B A)^T` of `(x A^T) B^T`, with `A (r, d)` and `B (o, r)`, where `d o < r (d + o)`.

    So for square `B`, as the triangular system of HRA, and for ranks so large that the product is smaller than its
    factors, which are this site's own. `B A` depends on parameters alone: in inference it is formed once. Safe because
    products of matrices associate. In training it would be formed again in each step, and its gradient takes a product
    of the size of the weight's own, so there the order stays.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> int:
        known = {*parameter_work(gm), *gm.graph.find_nodes(op="get_attr")}
        edits = 0
        for second in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            first, by = second.args[0], recorded(second)
            if by is None or not (is_product(first) and is_product(second)) or len(first.users) > 1:
                continue
            (x, a), b = first.args, second.args[1]
            if not known.issuperset((a, b)):
                continue
            inner, outer = value_of(gm, a), value_of(gm, b)
            if inner is None or outer is None or inner.dim() != 2 or outer.dim() != 2 or inner.dtype != outer.dtype:
                continue
            (r, d), o = inner.shape, outer.shape[0]
            # Shared by all sites, the factors take less than a product for each.
            if d * o < r * (d + o) and not (_reads_shared(a) or _reads_shared(b)):
                with gm.graph.inserting_before(second):
                    both = gm.graph.call_function(aten.matmul.default, (b, a))
                both.meta["val"] = torch.empty(o, d, dtype=inner.dtype, device="meta")
                record(both, by)
                second.args = (x, both)
                known.add(both)
                edits += 1
        return edits


def _reads_shared(node: fx.Node) -> bool:
    """Whether a tensor that all sites share goes into `node`, which is parameter work."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2].startswith(SHARED)
    return any(map(_reads_shared, node.all_input_nodes))
