"""Compute the operations of adapters that have a fast form by that form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...graph.operations import marked_call, unmarked
from ...graph.queries import obstacle_between, value_of
from ..pipeline import Declined, GraphPass, Outcome, Program


@dataclass(frozen=True)
class PutFastForms(GraphPass):
    """Replace the plain operators of an operation of `ops/` by its fast form, for example RoAd's and OFT's rotations.

    A fast form saves less for the backward pass, or reads memory less often. Safe because it computes the same, which
    the tests of the operation show; because the operators are still those that a call of the operation leaves
    (`marked_call`); and because nothing moves across a write in place or a change of mode. Sums may be rounded once
    less. In inference, where one token waits for calls and not for memory, the plain operators are as quick.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        for node in list(gm.graph.nodes):
            if (call := marked_call(node)) is None:
                continue
            types = {value.dtype for operand in call.operands if (value := value_of(gm, operand)) is not None}
            why = "its operands are of several types" if len(types) != 1 else ""
            if why := why or obstacle_between(gm, min(call.members), node):
                declined.append(Declined.at([node], why))
                continue
            with gm.graph.inserting_before(node):
                result = gm.graph.call_function(call.fast, tuple(call.operands))
            result.meta = unmarked(node.meta)
            node.replace_all_uses_with(result)
            edits += 1
        return Outcome(edits, tuple(declined))
