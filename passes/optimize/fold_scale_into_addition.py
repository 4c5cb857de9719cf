"""Let the addition of a branch do its scaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...graph.provenance import is_inserted
from ..pipeline import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScaleIntoAddition(GraphPass):
    """Add `s * z` to `y` in one go: `add(y, mul(z, s))` becomes `add(y, z, alpha=s)`, and the same for `sub`.

    So a branch of the size of `y` is not written and read once more. Safe because the product goes nowhere else and
    `alpha` is what it was multiplied by; the result is rounded once instead of twice, and to the same bits where `s` is
    a power of two. Types are promoted as before.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        for node in gm.graph.nodes:
            if not is_inserted(node) or node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
                continue
            y, product = node.args
            if node.target is aten.add.Tensor and _scaled(product) is None:
                y, product = product, y
            scaled = _scaled(product)
            # Two scaled alike may be meant to cancel to the last bit, as the start of PiSSA does.
            if scaled is not None and isinstance(y, fx.Node) and _scaled(y) is None:
                node.args, node.kwargs = (y, scaled[0]), {"alpha": scaled[1]}
                edits += 1
        return edits


def _scaled(node: object) -> tuple[fx.Node, float] | None:
    """What `node` multiplies by a number, and the number, if that is all that it is for."""
    if not isinstance(node, fx.Node) or not is_inserted(node) or node.target is not aten.mul.Tensor:
        return None
    z, scale = node.args
    if len(node.users) == 1 and isinstance(z, fx.Node) and isinstance(scale, float):
        return z, scale
    return None
