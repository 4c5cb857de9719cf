"""Multiply matrices of parameters first, where that leaves less to do for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.insertion import INLET, SHARED, is_inserted, record, recorded
from ...graph.parameter_work import parameter_work
from ...graph.queries import is_product, obstacle_between, reads_tensor, value_of
from ...graph.tensors import HALF
from ...graph.walk import ancestors
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten

_WIDEST = 4
"""The output of a site may be this many times as wide as its input. The branch gets as much wider when it moves."""


@dataclass(frozen=True)
class AssociateProducts(GraphPass):
    """Make `x W^T + t (W B)^T + b` of `(x + t B^T) W^T + b`, and then `x (B A)^T` of `(x A^T) B^T` if that is less.

    With `t` a low-rank product of `x`. So an adapter that adds a branch to the input of its site, as HRA does, runs as
    LoRA does, and can share and gather its products in the same way. `B A` is less than its factors where
    `d o < r (d + o)`, with `A (r, d)` and `B (o, r)`: for square `B`, such as the triangular system of HRA, and for
    large ranks. `W B` and `B A` depend on parameters alone, so that inference forms them once. Safe because products of
    matrices associate and distribute over sums, only the site reads the sum, and the types agree.

    The pass is for inference alone: training would form the products in each step, and their gradients take a product
    as large as the weight's own. In half precision a branch stays, because `W B` would be rounded. Factors that all
    sites share stay apart, because they take less memory than a product for each site.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        known = {*parameter_work(gm), *gm.graph.find_nodes(op="get_attr")}
        edits = 0
        declined = []
        linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        for y in linears:
            z: Any = y.args[0]
            if is_inserted(y) or not is_inserted(z):
                continue
            if not (why := _why_not_moved(gm, y, known)):
                known.add(_move(gm, y))
                edits += 1
            elif (provenance := recorded(z)) is not None and provenance.part == INLET:
                declined.append(Declined.at([z], why))
        for second in linears:
            first = second.args[0]
            if not (is_product(first) and is_product(second)):
                continue
            if not (why := _why_not_one(gm, first, second, known)):
                known.add(_make_one(gm, first, second))
                edits += 1
            elif second not in known:
                declined.append(Declined.at([second], why))
        return Outcome(edits, tuple(declined))


def _product(gm: fx.GraphModule, left: fx.Node, right: fx.Node, before: fx.Node) -> fx.Node:
    """Insert the product of two matrices of parameters before a node, and record it as of the node's adapter."""
    with gm.graph.inserting_before(before):
        matrix = gm.graph.create_node("call_function", aten.matmul.default, (left, right), name=f"{before.name}_matrix")
    rows, columns, provenance = value_of(gm, left), value_of(gm, right), recorded(before)
    assert rows is not None
    assert columns is not None
    assert provenance is not None
    matrix.meta["val"] = torch.empty(rows.shape[0], columns.shape[1], dtype=rows.dtype, device="meta")
    record(matrix, provenance)
    return matrix


# A branch at the input of a site.


def _why_not_moved(gm: fx.GraphModule, y: fx.Node, known: set[fx.Node]) -> str:
    """Return why no branch moves from the input of the site `y` to its output; empty if one does."""
    operands: Any = y.args
    z, weight = operands[:2]
    added = _sum_in(z)
    if not isinstance(added, fx.Node) or not is_inserted(added) or added.target is not aten.add.Tensor or added.kwargs:
        return "the adapter does not add to the input"
    branch: Any = added.args[1]
    if not is_product(branch) or not is_product(branch.args[0]):
        return "the adapter adds no low-rank branch to the input"
    if max(len(node.users) for node in (z, added, branch)) > 1:
        return "the branch or the sum is read elsewhere too"
    b = branch.args[1]
    if not reads_tensor(gm, weight) or b not in known:
        return "the weight or B depends on more than parameters"
    w_value, b_value = value_of(gm, weight), value_of(gm, b)
    if w_value is None or b_value is None or b_value.dim() != 2:
        return "the shape of B is not known"
    if w_value.dtype != b_value.dtype:
        return "the weight and B have different types"
    if w_value.dtype in HALF:
        return "in half precision W B would be rounded"
    if w_value.shape[0] > _WIDEST * w_value.shape[1]:
        return f"the output is more than {_WIDEST} times as wide as the input"
    return obstacle_between(gm, branch, y)


def _sum_in(z: fx.Node) -> Any:
    """Return the sum that `z`, the input of a site, casts to the type of the site; `z` itself if it does not cast."""
    return z.args[0] if is_inserted(z) and z.target is aten.type_as.default else z


def _move(gm: fx.GraphModule, y: fx.Node) -> fx.Node:
    """Add the branch at the input of the site `y` to its output, and return the matrix `W B`."""
    operands: Any = y.args
    z, weight = operands[:2]
    added = _sum_in(z)
    x, branch = added.args
    t, b = branch.args
    matrix = _product(gm, weight, b, branch)
    with gm.graph.inserting_after(y):
        total = gm.graph.create_node("call_function", aten.add.Tensor, (y, branch), name=f"{branch.name}_add")
    total.meta = {**y.meta, "custom": added.meta["custom"]}
    y.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    y.replace_input_with(z, x)
    branch.args = (t, matrix)
    for key in ("val", "tensor_meta"):  # it is as wide as the output now
        branch.meta.pop(key, None)
        branch.meta |= {key: y.meta[key]} if key in y.meta else {}
    return matrix


# A product of a product.


def _why_not_one(gm: fx.GraphModule, first: fx.Node, second: fx.Node, known: set[fx.Node]) -> str:
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


def _make_one(gm: fx.GraphModule, first: fx.Node, second: fx.Node) -> fx.Node:
    """Let `second` multiply the input of `first` by the product of the two matrices; return that product."""
    matrix = _product(gm, second.all_input_nodes[-1], first.all_input_nodes[-1], second)
    second.args = (first.args[0], matrix)
    return matrix


def _reads_shared(matrices: list[fx.Node]) -> bool:
    """Check whether a tensor that all sites of the adapter share goes into one of `matrices`."""
    read = (node for node in ancestors(matrices) if node.op == "get_attr")
    return any(str(node.target).rpartition(".")[2].startswith(SHARED) for node in read)
