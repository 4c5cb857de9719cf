"""Convert the mask of attention once, and not in each layer."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...graph.queries import is_on_cpu, obstacle_between
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


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
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, fx.Node) and _type_of(mask) is torch.bool:
                readers[mask].append(node)
        edits = 0
        declined = []
        for mask, attentions in readers.items():
            if why := _why_not(gm, mask, attentions):
                declined.append(Declined.at(attentions, why))
                continue
            with gm.graph.inserting_after(mask):
                numbers = gm.graph.call_function(aten.where.Scalar, (mask, 0.0, -math.inf))
            with gm.graph.inserting_after(numbers):
                converted = gm.graph.call_function(aten.to.dtype, (numbers, _type_of(attentions[0].args[0])))
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
    if len({_type_of(node.args[0]) for node in attentions}) > 1:
        return "the queries have different types"
    return obstacle_between(gm, mask, attentions[-1])


def _type_of(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
