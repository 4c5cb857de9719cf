"""Rotate blocks of inputs, as OFT does, by one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.provenance import is_inserted
from ...ops.rotated_blocks import RotatedBlocks
from ..pipeline import GraphPass, Outcome, Program
from .rotations import Rotation, replace_rotations

aten = torch.ops.aten


@dataclass(frozen=True)
class RotateBlocks(GraphPass):
    """Make one operation of `x + x B`, where an adapter multiplies blocks of `x` by matrices of their own.

    The products are then formed where `x` is, with no copy of it in another order, and autograd saves `x` once. Safe
    because no product is moved across a write in place or a change of mode. The sum is rounded once less. In inference,
    where one token waits for calls and not for memory, the plain operations are fewer.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        return replace_rotations(gm, _rotation)


def _rotation(node: fx.Node) -> Rotation | None:
    """Return the rotation of `x` by blocks, if `node` is the sum `x + x B` that an adapter computes."""
    if not is_inserted(node) or node.kwargs:
        return None
    x, flat = node.args
    if not isinstance(flat, fx.Node) or flat.target is not aten.flatten.using_ints or flat.args[1:] != (-2,):
        return None
    (products,) = flat.all_input_nodes
    if products.target is not aten.einsum.default or products.args[0] != "...nk,nkc->...nc":
        return None
    by_block, blocks = products.all_input_nodes
    if by_block.target is not aten.unflatten.int or by_block.args[:2] != (x, -1) or len(_sizes(by_block)) != 2:
        return None
    return Rotation(RotatedBlocks(), (by_block.all_input_nodes[0], blocks), first=products)


def _sizes(unflattened: fx.Node) -> Sequence[Any]:
    sizes: Any = unflattened.args[2]
    return sizes  # type: ignore[no-any-return]
