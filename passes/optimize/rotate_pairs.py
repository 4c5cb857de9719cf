"""Rotate pairs of outputs, as RoAd does, by one operation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...graph.provenance import is_inserted
from ...graph.queries import value_of
from ...ops.rotated_pairs import rotated_pairs
from ..pipeline import GraphPass, Outcome, Program
from .rotations import Rotation, replace_rotations

aten = torch.ops.aten


@dataclass(frozen=True)
class RotatePairs(GraphPass):
    """Make one operation of `p * straight + p.flip(-2) * crossed`, where adapters rotate pairs of outputs.

    Autograd then saves `p` once, and not a flipped copy too, and no product is written to memory and read again. Safe
    because nothing else reads what the operation stands for, all have one type, and no product is moved across a write
    in place or a change of mode. The sum is rounded once less. In inference, where one token waits for calls and not
    for memory, the plain operations are fewer.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        return replace_rotations(gm, functools.partial(_rotation, gm))


def _rotation(gm: fx.GraphModule, node: fx.Node) -> Rotation | None:
    """Return the rotation whose sum `node` is, if it is one that an adapter computes."""
    if not is_inserted(node) or node.kwargs or not all(map(_is_product, node.args)):
        return None
    kept: Any
    flipped: Any
    products = node.all_input_nodes
    kept, flipped = (product.args for product in products)
    if flipped[0].target is not aten.flip.default or tuple(flipped[0].args) != (kept[0], [-2]):
        return None
    if len(flipped[0].users) > 1:
        return None
    operands = kept[0], kept[1], flipped[1]
    same_type = len({_dtype(gm, operand) for operand in operands}) == 1
    obstacle = "" if same_type else "its terms are of several types"
    return Rotation(rotated_pairs, operands, min(flipped[0], *products), obstacle)


def _is_product(value: Any) -> bool:
    """Check whether a value is a product of two tensors that the sum alone reads."""
    if not isinstance(value, fx.Node) or value.target is not aten.mul.Tensor or len(value.users) > 1:
        return False
    return all(isinstance(factor, fx.Node) for factor in value.args)


def _dtype(gm: fx.GraphModule, node: fx.Node) -> torch.dtype | None:
    value = value_of(gm, node)
    return value.dtype if isinstance(value, Tensor) else None
