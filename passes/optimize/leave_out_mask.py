"""Leave out the mask of attention in calls where it hides nothing, or only what comes later."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ...graph.queries import boolean_masks, is_deterministic, obstacle_between, set_argument
from ...graph.walk import ancestors
from ...graph.writes import overwrites
from ...ops.attention_mask import MaskOfSizes, needed_mask
from ..pipeline import Declined, GraphPass, Outcome


@dataclass(frozen=True)
class LeaveOutMask(GraphPass):
    """Look at each mask of booleans once per call, and give attention `attn_mask` and `is_causal` that mean the same.

    A captured model builds its mask in every call, because capture cannot know the lengths and the padding. The model
    itself looks at its mask, and mostly needs none; at 2048 tokens, attention without one takes half of the time.
    Safe because `needed_mask` decides by the values of the mask, which no node changes before attention reads it. Where
    a call leaves out its attention mask, the mask follows from sizes, and is looked at once for each of them.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for mask, attentions in boolean_masks(gm).items():
            if why := obstacle_between(gm, mask, attentions[-1]):
                declined.append(Declined.at(attentions, why))
                continue
            graph = gm.graph
            sizes = None if overwrites(gm, gm.graph) else _sizes(mask)
            with graph.inserting_after(mask):
                look = needed_mask if sizes is None else MaskOfSizes()
                needed = graph.call_function(look, (mask, *(sizes or ())))
            with graph.inserting_after(needed):
                causal = graph.call_function(operator.getitem, (needed, 1))
                left = graph.call_function(operator.getitem, (needed, 0))
            left.meta["val"] = mask.meta["val"]  # or None, which passes need not know
            for node in attentions:
                node.replace_input_with(mask, left)
                set_argument(node, "is_causal", causal)
            edits += 1
        return Outcome(edits, tuple(declined))


def _sizes(mask: fx.Node) -> list[fx.Node] | None:
    """Return the sizes that the values of a mask follow from; None if they follow from the values of tensors too."""
    found = list(ancestors([mask], stop=_is_size))
    if not all(_is_size(node) or (node.op == "call_function" and is_deterministic(node)) for node in found):
        return None
    return [node for node in found if _is_size(node)]


def _is_size(node: fx.Node) -> bool:
    """Check whether `node` is a size of a tensor, or a number that is computed of sizes."""
    return node.target is torch.ops.aten.sym_size.int or isinstance(node.meta.get("val"), (int, torch.SymInt))
