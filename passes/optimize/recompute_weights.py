"""Compute a weight again in the backward pass that the graph computes of frozen tensors, as it does a quantized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.insertion import is_inserted
from ...graph.queries import reads_tensor
from ...graph.subgraph import function_between
from ...graph.walk import ancestors
from ...graph.writes import overwrites
from ...ops.recomputed_product import RecomputedProduct
from ...sites.computed import frozen_values, obstacle
from ...sites.dataflow import op_name
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RecomputeWeights(GraphPass):
    """Do not save a computed frozen weight for the gradient of the input of its linear: compute it once more there.

    Autograd would keep the dense weight of each quantized site until the backward pass, all of them together a dense
    copy of the model. The tensors that it is computed from are there anyway. The pass stands before `GatherProducts`,
    which leaves these linears alone.

    Safe because the same operations compute the weight again from the same frozen tensors, to the same bits
    (`computed.obstacle`). A graph that overwrites anything but its own buffers is left alone.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        frozen = frozen_values(gm.graph)
        linears = [
            node
            for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)
            if not is_inserted(node) and node.args[1] in frozen and _takes_memory(gm, node.args[1])
        ]
        if linears and overwrites(gm):
            return Outcome(0, (Declined.at(linears, "the graph overwrites tensors"),))
        edits = 0
        declined = []
        for node in linears:
            x, weight, bias = (*node.args, None)[:3]
            assert isinstance(weight, fx.Node)
            if why := obstacle(gm, weight, node):
                declined.append(Declined.at([node], why))
                continue
            sources = [read for read in ancestors([weight]) if read.op == "get_attr"]
            recipe: Any = function_between(sources, [weight])
            with gm.graph.inserting_before(node):
                product = gm.graph.create_node(
                    "call_function", RecomputedProduct(recipe), (x, bias, *sources), name=f"{node.name}_recomputing"
                )
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            gm.graph.erase_node(node)
            edits += 1
        return Outcome(edits, tuple(declined))


_VIEWS = frozenset(
    {"alias", "chunk", "detach", "expand", "getitem", "mT", "numpy_T", "permute", "reshape", "select", "slice", "split"}
    | {"split_with_sizes", "squeeze", "t", "to", "transpose", "type_as", "unsqueeze", "view"}
)


def _takes_memory(gm: fx.GraphModule, weight: Any) -> bool:
    """Return whether a weight is not a tensor of the module, nor a view or a cast of one."""
    return any(not reads_tensor(gm, node) and op_name(node) not in _VIEWS for node in ancestors([weight]))
