"""Leave out dropout in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...graph.modes import is_flag
from ..pipeline import Declined, GraphPass, Outcome, Program


@dataclass(frozen=True)
class LeaveOutDropout(GraphPass):
    """Replace each dropout that follows the mode of a module by its input.

    Adapters with dropout then read the input of their site like the others, so that they can share products. Safe
    because the pass is for the inference program, which runs where all parts are in evaluation mode alone: there
    dropout returns its input.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"inference"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
            x, _, mode = node.args
            if is_flag(mode):
                node.replace_all_uses_with(x)
                gm.graph.erase_node(node)
                edits += 1
            elif mode is True:
                declined.append(Declined.at([node], "the dropout does not follow the mode"))
        return Outcome(edits, tuple(declined))
