"""Multiply the small matrices of an adapter first, where that leaves less to do for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...graph.parameter_work import parameter_work
from ...graph.provenance import SHARED, record, recorded
from ...graph.queries import is_product, value_of
from ...graph.walk import ancestors
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class AssociateProducts(GraphPass):
    """Make `x (B A)^T` of `(x A^T) B^T`, with `A (r, d)` and `B (o, r)`, where `d o < r (d + o)`.

    That holds for square `B`, such as the triangular system of HRA, and for ranks so large that `B A` is smaller than
    its factors. `B A` depends on parameters alone, so that inference forms it once. Safe because products of matrices
    associate.

    The pass is for inference alone: training would form `B A` again in each step, and its gradient takes a product as
    large as the weight's own. Factors that all sites share stay apart, because they take less memory than a product for
    each site.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        known = {*parameter_work(gm), *gm.graph.find_nodes(op="get_attr")}
        edits = 0
        declined = []
        for second in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            first = second.args[0]
            if not (is_product(first) and is_product(second)):
                continue
            if not (why := _why_not(gm, first, second, known)):
                known.add(_associate(gm, first, second))
                edits += 1
            elif second not in known:
                declined.append(Declined.at([second], why))
        return Outcome(edits, tuple(declined))


def _why_not(gm: fx.GraphModule, first: fx.Node, second: fx.Node, known: set[fx.Node]) -> str:
    """Return why `second`, a product of `first`, does not become one product; empty if it does."""
    a, b = first.all_input_nodes[-1], second.all_input_nodes[-1]
    if len(first.users) > 1:
        return "the first product is read elsewhere too"
    if not known.issuperset((a, b)):
        return "a matrix depends on more than parameters"
    inner, outer = value_of(gm, a), value_of(gm, b)
    if inner is None or outer is None or inner.dim() != 2 or outer.dim() != 2:
        return "the shape of a matrix is not known"
    if inner.dtype != outer.dtype:
        return "the matrices have different types"
    (r, d), o = inner.shape, outer.shape[0]
    if d * o >= r * (d + o):
        return "two narrow products take less than one"
    return "all sites share a matrix" if _reads_shared([a, b]) else ""


def _associate(gm: fx.GraphModule, first: fx.Node, second: fx.Node) -> fx.Node:
    """Let `second` multiply the input of `first` by the product of the two matrices; return that product."""
    (x, a), (_, b) = first.args, second.args
    with gm.graph.inserting_before(second):
        matrix = gm.graph.create_node("call_function", aten.matmul.default, (b, a), name=f"{second.name}_matrix")
    inner, outer = value_of(gm, first.all_input_nodes[-1]), value_of(gm, second.all_input_nodes[-1])
    provenance = recorded(second)
    assert inner is not None
    assert outer is not None
    assert provenance is not None
    matrix.meta["val"] = torch.empty(outer.shape[0], inner.shape[1], dtype=inner.dtype, device="meta")
    record(matrix, provenance)
    second.args = (x, matrix)
    return matrix


def _reads_shared(matrices: list[fx.Node]) -> bool:
    """Check whether a tensor that all sites of the adapter share goes into one of `matrices`."""
    read = (node for node in ancestors(matrices) if node.op == "get_attr")
    return any(str(node.target).rpartition(".")[2].startswith(SHARED) for node in read)
