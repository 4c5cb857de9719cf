"""Convert the mask of attention once, and not in each layer."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...graph.queries import is_on_cpu, must_not_move
from ..pipeline import GraphPass, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertMaskOnce(GraphPass):
    """Give attention what it makes of a mask of booleans: zero for what is seen, and minus infinity for the rest.

    Each call of attention makes that itself, and keeps it for the backward pass, as large as the square of the length.
    Safe because it is what the operator does first, in the type of the queries. On the CPU alone: elsewhere some
    kernels take the booleans. Not with checkpointed layers, whose inputs are kept: there booleans are smaller.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "inference"})

    def run(self, gm: fx.GraphModule) -> int:
        if not is_on_cpu(gm):
            return 0
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if isinstance(mask, fx.Node) and _type_of(mask) is torch.bool:
                readers[mask].append(node)
        edits = 0
        for mask, found in readers.items():
            types = {_type_of(node.args[0]) for node in found}
            if len(found) > 1 and len(types) == 1 and not must_not_move(gm, mask, found[-1]):
                with gm.graph.inserting_after(mask):
                    numbers = gm.graph.call_function(aten.where.Scalar, (mask, 0.0, -math.inf))
                with gm.graph.inserting_after(numbers):
                    converted = gm.graph.call_function(aten.to.dtype, (numbers, *types))
                for node in found:
                    node.replace_input_with(mask, converted)
                edits += 1
        return edits


def _type_of(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
