"""Parts of a graph as functions of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from .direct_calls import call_directly
from .walk import ancestors


def extract(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    """The graph that computes the tuple of `results` from `inputs`, and runs nothing that they do not need.

    Args:
        inputs: what its placeholders stand for, in order.
        results: nodes that depend on these, and on tensors of the module.
    """
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in sorted(set(ancestors(results, stop=copies.__contains__)).difference(copies)):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return graph


def segment(members: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """All of `members`, in order, as a graph of its own; the nodes that they read, and those of them that others read.

    These are its inputs and, as a tuple, its results.
    """
    own = set(members)
    inputs = list(dict.fromkeys(read for node in members for read in node.all_input_nodes if read not in own))
    results = [node for node in members if not own.issuperset(node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return graph, inputs, results


def replace_by_call(
    outer: fx.Graph, name: str, inputs: Sequence[fx.Node], members: Sequence[fx.Node], results: Sequence[fx.Node]
) -> None:
    """Replace the nodes `members` of `outer` by a call of the module's method `name`, which returns their `results`."""
    own = set(members)
    with outer.inserting_after(members[-1]):
        call = outer.call_module(name, tuple(inputs))
    with outer.inserting_after(call):
        for index, node in reversed(list(enumerate(results))):
            result = outer.call_function(operator.getitem, (call, index))
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    for node in reversed(members):
        outer.erase_node(node)


def forward_of(gm: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """`graph` as a function of a module that has what `gm` has, and its inputs. It is of no other use afterwards."""
    call_directly(graph)
    return type(fx.GraphModule(gm, graph)).forward
