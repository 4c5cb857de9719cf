"""Compute what depends on parameters alone once, and not in every call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from ...graph.insertion import place_of, qualified_names, recorded
from ...graph.parameter_work import move_to_front, parameter_work
from ...graph.tensors import tensor_of
from ...graph.walk import ancestors
from ..pipeline import Declined, GraphPass, Outcome

_LARGEST = 4
"""A value is kept between calls if it is at most this many times as large as the adapter's tensors."""


@dataclass(frozen=True)
class HoistParameterWork(GraphPass):
    """Move the nodes of adapters that depend on parameters and frozen tensors alone before the inputs of the graph.

    Such nodes compute norms, rotations and folded factors. What stands before the inputs is computed once inside a
    scope of `frozen`, and in each call outside of it, by the layer that it belongs to. Safe because no input of the
    graph enters these nodes, and they draw no random numbers and write nothing: the same tensors give the same values,
    wherever the nodes stand.

    Values much larger than the adapter's tensors stay where they are, for example the whole weights that a Fourier
    transform or a Hadamard product makes. Kept for every site, they would be a second model.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        sizes = {name: tensor_of(gm, name).numel() for name in read & _adapter_tensors(gm.graph)}
        work = set(parameter_work(gm))
        declined: dict[str, Declined] = {}  # by site: of the nodes that one value is computed by, the last
        for node in sorted(work, reverse=True):
            if not work.issuperset(node.users) and (why := _why_not_cached(node, sizes)):
                work.remove(node)
                declined.setdefault(place_of(node), Declined.at([node], why))
        hoisted: dict[fx.Node, None] = {}  # in the order of the graph, without what is computed of values that stay
        for node in sorted(work):
            if all(operand in hoisted or operand.op == "get_attr" for operand in node.all_input_nodes):
                hoisted[node] = None
        return Outcome(move_to_front(gm.graph, hoisted), tuple(declined.values()))


def _adapter_tensors(graph: fx.Graph) -> set[str]:
    """Return the qualified names of all adapter tensors; every node of an adapter names them, so one is enough."""
    records = (provenance for node in graph.nodes if (provenance := recorded(node)) is not None)
    adapters = {(by.site, by.adapter, by.position, tuple(by.names), by.adapter_name) for by in records}
    return {name for adapter in adapters for name in qualified_names(*adapter).values()}


def _why_not_cached(node: fx.Node, sizes: dict[str, int]) -> str:
    """Return why the value of `node` is not worth caching beside adapter tensors of these `sizes`; empty if it is."""
    if node.op == "get_attr":
        return ""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "the size of a value is not known"
    tensors = sum(sizes.get(name, 0) for name in {str(read.target) for read in ancestors([node])})
    if not all(isinstance(size, int) for size in value.shape):
        return ""  # the factors of the rows of a batch, selected from those of a bank
    if math.prod(value.shape) <= _LARGEST * tensors:
        return ""
    return f"a value {tuple(value.shape)} is more than {_LARGEST} times as large as the adapter's tensors"
