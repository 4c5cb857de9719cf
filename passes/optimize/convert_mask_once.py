"""Convert the mask of attention once, and not in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...graph.queries import boolean_masks, dtype_of, is_on_cpu, obstacle_between
from ...ops.attention_mask import as_numbers
from ..pipeline import Declined, GraphPass, Outcome, Program


@dataclass(frozen=True)
class ConvertMaskOnce(GraphPass):
    """Give attention a mask of numbers instead of booleans: zero for what is seen, and minus infinity for the rest.

    Otherwise each call of attention makes these numbers itself, and keeps them for the backward pass: a tensor as large
    as the square of the length. Safe because it is what the operator does first, in the type of the queries. The pass
    runs on the CPU alone, because some kernels of other devices take the booleans. It leaves checkpointed layers alone,
    because they keep their inputs, and booleans are smaller.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "inference"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for mask, attentions in boolean_masks(gm).items():
            if why := _why_not(gm, mask, attentions):
                declined.append(Declined.at(attentions, why))
                continue
            with gm.graph.inserting_after(mask):
                converted = gm.graph.call_function(as_numbers, (mask, dtype_of(attentions[0].args[0])))
            for node in attentions:
                node.replace_input_with(mask, converted)
            edits += 1
        return Outcome(edits, tuple(declined))


def _why_not(gm: fx.GraphModule, mask: fx.Node, attentions: list[fx.Node]) -> str:
    """Return why `mask` is not converted for these `attentions`; empty if it is."""
    if not is_on_cpu(gm):
        return "not on the CPU"
    if len(attentions) == 1:
        return "no other attention reads the mask"
    if len({dtype_of(node.args[0]) for node in attentions}) > 1:
        return "the queries have different types"
    return obstacle_between(gm, mask, attentions[-1])
