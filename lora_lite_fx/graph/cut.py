"""Cut a graph into parts that run one after the other, each of which computes anew what depends on inputs alone."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..compat.torch import is_transform
from .insertion import is_inserted
from .layers import layer_of
from .queries import is_deterministic
from .regions import closes_region, opens_region, sets_mode
from .tensors import attribute_of
from .walk import ancestors
from .writes import overwritten_tensors


@dataclass(frozen=True)
class Part:
    """A part of a graph.

    Args:
        nodes: those that it computes, in graph order.
        received: the values that the part before it gives it.
        results: the values that it gives to the one after it; of the last part, the results of the graph.
    """

    nodes: tuple[fx.Node, ...]
    received: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def graph(self, inputs: Sequence[fx.Node]) -> fx.Graph:
        """Return the part as a graph: it takes what it receives, then `inputs`; a single result is returned bare."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.received:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in (*inputs, *self.nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        results = tuple(copies[node] for node in self.results)
        graph.output(results[0] if len(results) == 1 else results)
        return graph


def cut_at(gm: fx.GraphModule, graph: fx.Graph, starts: Iterable[fx.Node]) -> list[Part]:
    """Cut `graph` before the nodes `starts`.

    A part gets from the one before it what earlier ones have computed and it or a later one reads. What depends on the
    inputs of the graph and on buffers alone, such as masks, is computed in each part that reads it: so no part sends
    it, and no part sends integers.

    Args:
        gm: has the tensors.
        graph: its graph, or one derived from it.
        starts: nodes of `graph`, in order.

    Returns:
        The parts, one more than `starts`.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    borders = [position[node] for node in starts]
    part_of = {node: bisect_right(borders, index) for node, index in position.items()}
    anew = _computed_anew(gm, graph)
    spans = spans_of(graph)
    returned: list[fx.Node] = []
    fx.node.map_arg(graph.output_node().args, returned.append)
    own = [node for node in graph.nodes if node not in anew and node.op not in ("placeholder", "get_attr", "output")]
    last_read = {node: max((part_of[user] for user in node.users if user not in anew), default=-1) for node in own}
    parts = []
    before: tuple[fx.Node, ...] = ()
    for index in range(len(borders) + 1):
        members = [node for node in own if part_of[node] == index]
        results = returned if index == len(borders) else [n for n in own if part_of[n] <= index < last_read[n]]
        given = set(before)
        needed = set(ancestors([*members, *results], stop=given.__contains__))
        for span in spans:  # the borders of a region are read by nothing
            if not needed.isdisjoint(span):
                needed |= set(ancestors(span, stop=given.__contains__))
        computed = sorted(node for node in needed - given if node.op != "placeholder")
        parts.append(Part(tuple(computed), before, tuple(results)))
        before = tuple(results)
    return parts


def spans_of(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of each outermost region of `graph`, with its borders, and those of levels of transforms."""
    spans: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if opens_region(node):
            depth += 1
            if depth == 1:
                spans.append([])
        if depth:
            spans[-1].append(node)
        depth -= closes_region(node)
    if transforms := [node for node in graph.nodes if is_transform(node)]:
        first, last = transforms[0], transforms[-1]
        spans.append([node for node in graph.nodes if not (node < first or last < node)])
    return spans


def _computed_anew(gm: fx.GraphModule, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes outside of layers that compute something of inputs and buffers alone."""
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    anew: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if str(node.target) not in parameters and _is_tensor(gm, str(node.target)):
                anew.add(node)
        elif node.op == "placeholder" or (
            layer_of(node) is None
            and not is_inserted(node)
            and (_is_pure(node) or sets_mode(node) or is_transform(node))
            and anew.issuperset(node.all_input_nodes)
        ):
            anew.add(node)
    for made_by, readers in overwritten_tensors(gm, graph):
        anew.difference_update([*readers, *([made_by] if made_by else [])])
    for span in spans_of(graph):
        if not anew.issuperset(span):
            anew.difference_update(span)
    while kept := [node for node in anew if node.op.startswith("call") and not anew.issuperset(node.all_input_nodes)]:
        anew.difference_update(kept)
    return anew


def _is_tensor(gm: nn.Module, name: str) -> bool:
    try:
        return isinstance(attribute_of(gm, name), Tensor)
    except (AssertionError, AttributeError):
        return False


def _is_pure(node: fx.Node) -> bool:
    return is_deterministic(node) or getattr(node.target, "__module__", "") == operator.mul.__module__


def value_is_tensor(node: fx.Node) -> bool:
    """Check whether the value of `node` is a tensor, as far as its record says."""
    value: Any = node.meta.get("val", node.meta.get("example_value"))
    return value is None or isinstance(value, Tensor)
