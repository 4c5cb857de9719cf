"""Add a branch to the output of its site instead of to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.parameter_work import parameter_work
from ...graph.provenance import is_inserted, record, recorded
from ...graph.queries import (
    is_product,
    must_not_move,
    reads_tensor,
    value_of,
)
from ...graph.tensors import HALF
from ..pipeline import GraphPass, Program

aten = torch.ops.aten

_WIDEST = 4
"""How many times as wide as its input an output may be. The branch gets as much wider, and the sum one pass shorter."""


@dataclass(frozen=True)
class MoveBranchesToOutputs(GraphPass):
    """Make `x W^T + t (W B)^T + b` of `(x + t B^T) W^T + b`, with `t` a low-rank product of `x`.

    So HRA, which reflects what a site reads, runs as LoRA does, and can share and gather its products in the same way.
    `W B` depends on parameters alone: in inference it is formed once. Safe because products distribute over sums, the
    sum goes nowhere else, and types agree; not in half precision, where `W B` would be rounded. In training the
    gradient of `W B` would take a product as large as the weight's own.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> int:
        known = {*parameter_work(gm), *gm.graph.find_nodes(op="get_attr")}
        edits = 0
        for y in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            edits += _move(gm, y, known)
        return edits


def _move(gm: fx.GraphModule, y: fx.Node, known: set[fx.Node]) -> bool:
    z: Any = y.args[0]
    weight = y.args[1]
    if is_inserted(y) or not isinstance(weight, fx.Node) or not reads_tensor(gm, weight):
        return False
    added = z.args[0] if _is_inserted(z, aten.type_as.default) else z
    if not _is_inserted(added, aten.add.Tensor) or added.kwargs or len(added.users) > 1 or len(z.users) > 1:
        return False
    x, branch = added.args
    if not is_product(branch) or len(branch.users) > 1 or not is_product(branch.args[0]):
        return False
    t, b = branch.args
    w_value, b_value = value_of(gm, weight), value_of(gm, b)
    if b not in known or w_value is None or b_value is None or b_value.dim() != 2 or w_value.dtype != b_value.dtype:
        return False
    if w_value.dtype in HALF or w_value.shape[0] > _WIDEST * w_value.shape[1] or must_not_move(gm, branch, y):
        return False
    by = recorded(added)
    assert by is not None
    with gm.graph.inserting_before(branch):
        both = gm.graph.call_function(aten.matmul.default, (weight, b))
    both.meta["val"] = w_value.new_empty(w_value.shape[0], b_value.shape[1], device="meta")
    with gm.graph.inserting_after(y):
        total = gm.graph.call_function(aten.add.Tensor, (y, branch))
    total.meta = dict(y.meta)
    record(both, by)
    record(total, by)
    y.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    y.replace_input_with(z, x)
    branch.args = (t, both)
    return True


def _is_inserted(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and is_inserted(node) and node.target is target
