"""Let the addition of a branch do its scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.insertion import is_inserted
from ..pipeline import Declined, GraphPass, Outcome

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScaleIntoAddition(GraphPass):
    """Make `add(y, z, alpha=s)` of `add(y, mul(z, s))`, and the same for `sub`.

    So a branch of the size of `y` is not written and read once more. Safe because nothing else reads the scaled branch,
    and `alpha` is the number that scaled it. The result is rounded once instead of twice, and to the same bits where
    `s` is a power of two. Types are promoted as before.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for node in gm.graph.nodes:
            if not is_inserted(node) or node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
                continue
            y, branch = node.args
            if node.target is aten.add.Tensor and not _is_scaled(branch):
                y, branch = branch, y
            if not isinstance(y, fx.Node) or not _is_scaled(branch):
                continue
            if _is_scaled(y):
                why = "both terms are scaled: rounded alike, they may cancel to the last bit"  # as at PiSSA's start
            elif len(branch.users) > 1:
                why = "the scaled branch is read elsewhere too"
            else:
                z, scale = branch.args
                node.args, node.kwargs = (y, z), {"alpha": scale}
                edits += 1
                continue
            declined.append(Declined.at([node], why))
        return Outcome(edits, tuple(declined))


def _is_scaled(node: Any) -> bool:
    """Check whether `node` is the product of an adapter's value with a number."""
    if not isinstance(node, fx.Node) or not is_inserted(node) or node.target is not aten.mul.Tensor:
        return False
    z, scale = node.args
    return isinstance(z, fx.Node) and isinstance(scale, float)
