"""Rotate pairs of outputs, as RoAd does, by one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.provenance import is_inserted
from ...graph.queries import obstacle_between, value_of
from ...ops.rotated_pairs import rotated_pairs
from ..pipeline import Declined, GraphPass, Outcome, Program

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
        edits = 0
        declined = []
        for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            rotation = _rotation(node)
            if rotation is None:
                continue
            same_type = len({_dtype(gm, operand) for operand in rotation.operands}) == 1
            if why := obstacle_between(gm, rotation.first, node) if same_type else "its terms are of several types":
                declined.append(Declined.at([node], why))
                continue
            with gm.graph.inserting_before(node):
                rotated = gm.graph.call_function(rotated_pairs, rotation.operands)
            rotated.meta = dict(node.meta)
            node.replace_all_uses_with(rotated)
            edits += 1
        return Outcome(edits, tuple(declined))


class _Rotation(NamedTuple):
    """The operands of `rotated_pairs`, and the first node that it stands for."""

    operands: tuple[fx.Node, fx.Node, fx.Node]
    first: fx.Node


def _rotation(node: fx.Node) -> _Rotation | None:
    """Return the operands of the rotation whose sum `node` is, if it is one that an adapter computes."""
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
    return _Rotation((kept[0], kept[1], flipped[1]), min(flipped[0], *products))


def _is_product(value: Any) -> bool:
    """Check whether a value is a product of two tensors that the sum alone reads."""
    if not isinstance(value, fx.Node) or value.target is not aten.mul.Tensor or len(value.users) > 1:
        return False
    return all(isinstance(factor, fx.Node) for factor in value.args)


def _dtype(gm: fx.GraphModule, node: fx.Node) -> torch.dtype | None:
    value = value_of(gm, node)
    return value.dtype if isinstance(value, Tensor) else None
