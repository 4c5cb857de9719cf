"""Drop the empty tensors that the first tokens of a cache are appended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..pipeline import GraphPass


@dataclass(frozen=True)
class DropEmptyParts(GraphPass):
    """Take tensors of shape `(0,)` out of concatenations of others.

    Safe because torch skips them there. A cache begins with such a tensor, in the type of its first tokens. Recorded,
    that is the type at capture, and under `torch.autocast` the concatenation would give the tokens that type.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
            parts = [part for part in node.args[0] if not _has_no_element(part)]
            is_of_one_type = len({part.meta["val"].dtype for part in node.args[0]}) == 1
            if parts and len(parts) < len(node.args[0]) and is_of_one_type:
                node.args = (parts, *node.args[1:])
                edits += 1
        return edits


def _has_no_element(node: fx.Node) -> bool:
    """Tell whether a node is a tensor of shape `(0,)`, whatever values sizes that follow from values take."""
    shape = node.meta["val"].shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0
