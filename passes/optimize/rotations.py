"""Replace the sums of rotations that adapters compute by one operation each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from ...graph.queries import obstacle_between
from ..pipeline import Declined, Outcome


class Rotation(NamedTuple):
    """The rotation whose sum a node is.

    Args:
        operation: computes it.
        operands: what `operation` takes.
        first: the first node that it stands for, whose product it forms later.
        obstacle: why it may not replace the sum; empty if it may.
    """

    operation: Callable[..., Any]
    operands: tuple[fx.Node, ...]
    first: fx.Node
    obstacle: str = ""


def replace_rotations(gm: fx.GraphModule, rotation_of: Callable[[fx.Node], Rotation | None]) -> Outcome:
    """Replace each sum by the operation of its rotation, where no product is moved across a write or another mode.

    Args:
        gm: the graph, which is changed.
        rotation_of: returns the rotation whose sum a node is, or None.
    """
    edits = 0
    declined = []
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        rotation = rotation_of(node)
        if rotation is None:
            continue
        if why := rotation.obstacle or obstacle_between(gm, rotation.first, node):
            declined.append(Declined.at([node], why))
            continue
        with gm.graph.inserting_before(node):
            rotated = gm.graph.call_function(rotation.operation, rotation.operands)
        rotated.meta = dict(node.meta)
        node.replace_all_uses_with(rotated)
        edits += 1
    return Outcome(edits, tuple(declined))
