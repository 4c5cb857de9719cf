"""Build constants into a graph in the place of inputs that a call leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...capture.graph_calls import return_as
from ...capture.signature import Omission
from ..pipeline import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class LeaveOutInputs(GraphPass):
    """Replace inputs by constants of their shape, and drop the results that the model does not return without them.

    Safe because capture compared the two: the model returns to a call without these arguments what it returns to the
    constants. What only the dropped results needed, such as a loss, is dead code afterwards. The placeholders stay, so
    that the graph is called as before, with None for what is left out. The results are returned as a flat tuple.

    Args:
        omission: the constants and the results that remain.
    """

    omission: Omission

    def run(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        placeholders = graph.find_nodes(op="placeholder")
        for place, fill in self.omission.fills.items():
            node = placeholders[place]
            with graph.inserting_before(placeholders[-1].next):
                sizes = [self._size(placeholders, size) for size in fill.sizes]
                constant = graph.call_function(aten.full.default, (sizes, fill.value))
            constant.kwargs = {"dtype": fill.dtype, "device": fill.device}
            constant.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(constant)
        (results,) = graph.output_node().args
        flat = list(results) if isinstance(results, (list, tuple)) else [results]
        graph.output_node().args = (tuple(flat[index] for index in self.omission.outputs),)
        return_as(graph, None)
        return len(self.omission.fills)

    def _size(self, placeholders: Sequence[fx.Node], size: int | tuple[int, int]) -> int | fx.Node:
        if isinstance(size, int):
            return size
        place, dim = size
        return placeholders[place].graph.call_function(aten.sym_size.int, (placeholders[place], dim))
