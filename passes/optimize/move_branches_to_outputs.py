"""Add a branch to the output of its site instead of to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.parameter_work import parameter_work
from ...graph.provenance import INLET, is_inserted, record, recorded
from ...graph.queries import (
    is_product,
    obstacle_between,
    reads_tensor,
    value_of,
)
from ...graph.tensors import HALF
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten

_WIDEST = 4
"""The output of a site may be this many times as wide as its input. The branch gets as much wider when it moves."""


@dataclass(frozen=True)
class MoveBranchesToOutputs(GraphPass):
    """Make `x W^T + t (W B)^T + b` of `(x + t B^T) W^T + b`, with `t` a low-rank product of `x`.

    HRA, which reflects the input of a site, then runs as LoRA does, and can share and gather its products in the same
    way. `W B` depends on parameters alone, so that inference forms it once. Safe because products distribute over sums,
    only the site reads the sum, and the types agree.

    The pass is for inference alone, because in training the gradient of `W B` takes a product as large as the weight's
    own. In half precision the branch stays, because `W B` would be rounded.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        known = {*parameter_work(gm), *gm.graph.find_nodes(op="get_attr")}
        edits = 0
        declined = []
        for y in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            z: Any = y.args[0]
            if is_inserted(y) or not is_inserted(z):
                continue
            if not (why := _why_not(gm, y, known)):
                _move(gm, y)
                edits += 1
            elif (provenance := recorded(z)) is not None and provenance.part == INLET:
                declined.append(Declined.at([z], why))
        return Outcome(edits, tuple(declined))


def _why_not(gm: fx.GraphModule, y: fx.Node, known: set[fx.Node]) -> str:
    """Return why no branch moves from the input of the site `y` to its output; empty if one does."""
    z, weight = _operands(y)
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


def _operands(y: fx.Node) -> tuple[Any, Any]:
    return y.args[0], y.args[1]


def _sum_in(z: fx.Node) -> Any:
    """Return the sum that `z`, the input of a site, casts to the type of the site; `z` itself if it does not cast."""
    return z.args[0] if is_inserted(z) and z.target is aten.type_as.default else z


def _move(gm: fx.GraphModule, y: fx.Node) -> None:
    z, weight = _operands(y)
    added = _sum_in(z)
    x, branch = added.args
    t, b = branch.args
    w_value, b_value = value_of(gm, weight), value_of(gm, b)
    provenance = recorded(added)
    assert w_value is not None
    assert b_value is not None
    assert provenance is not None
    with gm.graph.inserting_before(branch):
        matrix = gm.graph.create_node("call_function", aten.matmul.default, (weight, b), name=f"{b.name}_matmul")
    matrix.meta["val"] = w_value.new_empty(w_value.shape[0], b_value.shape[1], device="meta")
    with gm.graph.inserting_after(y):
        total = gm.graph.create_node("call_function", aten.add.Tensor, (y, branch), name=f"{branch.name}_add")
    total.meta = dict(y.meta)
    record(matrix, provenance)
    record(total, provenance)
    y.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    y.replace_input_with(z, x)
    branch.args = (t, matrix)
    branch.meta = {key: value for key, value in branch.meta.items() if key not in ("val", "tensor_meta")}
    branch.meta |= {
        key: y.meta[key] for key in ("val", "tensor_meta") if key in y.meta
    }  # it is as wide as the output now
