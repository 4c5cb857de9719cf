"""Rotate blocks of inputs, as OFT does, by one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.provenance import is_inserted
from ...graph.queries import have_one_dtype
from ...ops.rotated_blocks import RotatedBlocks
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RotateBlocks(GraphPass):
    """Make one operation of `x + x B`, where an adapter multiplies blocks of `x` by matrices of their own.

    The products are then formed where `x` is, with no copy of it in another order, and autograd saves `x` once. Safe
    because nothing else reads what the operation stands for, and all have one type. The sum is rounded once less. In
    inference, where one token waits for calls and not for memory, the plain operations are fewer.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            operands = _rotation(node)
            if operands is None:
                continue
            if not have_one_dtype(gm, operands):
                declined.append(Declined.at([node], "its terms are of several types"))
                continue
            with gm.graph.inserting_before(node):
                rotated = gm.graph.call_function(RotatedBlocks(), operands)
            rotated.meta = dict(node.meta)
            node.replace_all_uses_with(rotated)
            edits += 1
        return Outcome(edits, tuple(declined))


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return `x` and the blocks, if `node` is the sum `x + x B` that an adapter computes."""
    if not is_inserted(node) or node.kwargs:
        return None
    turned: Any
    x, turned = node.args
    products = _operand_of(turned, aten.flatten.using_ints, -2)
    if products is None or products.target is not aten.einsum.default or products.args[0] != "...nk,nkc->...nc":
        return None
    by_block, blocks = products.all_input_nodes
    if len(turned.users) + len(products.users) > 2 or _operand_of(by_block, aten.unflatten.int, -1) is not x:
        return None
    return by_block.all_input_nodes[0], blocks


def _operand_of(node: Any, target: Any, dim: int) -> fx.Node | None:
    """Return the value whose last dimensions `node` shapes by the operator `target`."""
    if not isinstance(node, fx.Node) or node.target is not target or node.args[1] != dim:
        return None
    return node.all_input_nodes[0]
