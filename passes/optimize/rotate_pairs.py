"""Rotate pairs of outputs, as RoAd does, by one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from ...graph.provenance import is_inserted
from ...graph.queries import have_one_dtype
from ...ops.rotated_pairs import rotated_pairs
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RotatePairs(GraphPass):
    """Make one operation of `p * straight + p.flip(-2) * crossed`, where adapters rotate pairs of outputs.

    Autograd then saves `p` once, and not a flipped copy too, and no product is written to memory and read again. Safe
    because nothing else reads what the operation stands for, and all have one type. The sum is rounded once less. In
    inference, where one token waits for calls and not for memory, the plain operations are fewer.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            rotation = _rotation(node)
            if rotation is None:
                continue
            if not have_one_dtype(gm, rotation):
                declined.append(Declined.at([node], "its terms are of several types"))
                continue
            with gm.graph.inserting_before(node):
                rotated = gm.graph.call_function(rotated_pairs, tuple(rotation))
            rotated.meta = dict(node.meta)
            node.replace_all_uses_with(rotated)
            edits += 1
        return Outcome(edits, tuple(declined))


class _Rotation(NamedTuple):
    """The operands of `rotated_pairs`."""

    pairs: fx.Node
    straight: fx.Node
    crossed: fx.Node


def _rotation(node: fx.Node) -> _Rotation | None:
    """Return the operands of the rotation whose sum `node` is, if it is one that an adapter computes."""
    if not is_inserted(node) or node.kwargs or not all(map(_is_product, node.args)):
        return None
    kept: Any
    flipped: Any
    kept, flipped = (product.args for product in node.all_input_nodes)
    if flipped[0].target is not aten.flip.default or tuple(flipped[0].args) != (kept[0], [-2]):
        return None
    return None if len(flipped[0].users) > 1 else _Rotation(kept[0], kept[1], flipped[1])


def _is_product(value: Any) -> bool:
    """Check whether a value is a product of two tensors that the sum alone reads."""
    if not isinstance(value, fx.Node) or value.target is not aten.mul.Tensor or len(value.users) > 1:
        return False
    return all(isinstance(factor, fx.Node) for factor in value.args)
