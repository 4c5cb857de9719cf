"""Leave out dropout where nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..pipeline import GraphPass, Program


@dataclass(frozen=True)
class LeaveOutDropout(GraphPass):
    """Replace dropout that follows the mode of the module by its input.

    Adapters with dropout then read the input of their site like the others, so that they can share products. Safe
    because the program that it is for runs in evaluation alone, where dropout returns its input.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
            x, _, mode = node.args
            if isinstance(mode, fx.Node) and mode.op == "get_attr":  # the mode flag
                node.replace_all_uses_with(x)
                gm.graph.erase_node(node)
                edits += 1
        return edits
