"""Parts of a graph as functions of their own."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import fx, nn

from .direct_calls import call_directly
from .walk import ancestors


def extract(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    """Return a graph that computes the tuple of `results` from `inputs`, and nothing else.

    Args:
        inputs: the nodes that become its placeholders, in order.
        results: nodes that depend on the inputs and on tensors of the module alone.
    """
    return copy_of(_between(inputs, results), inputs, tuple(results))


def _between(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes that compute `results` from `inputs`, in graph order."""
    inside = set(ancestors(results, stop=set(inputs).__contains__))
    return sorted(inside.difference(inputs))


def segment(members: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Copy all of `members` into a graph of their own.

    Args:
        members: nodes in graph order.

    Returns:
        The graph; the nodes outside that the members read, which are its inputs; and the members that nodes outside
        read, which are its results, as a tuple.
    """
    inside = set(members)
    inputs = list(dict.fromkeys(read for node in members for read in node.all_input_nodes if read not in inside))
    results = [node for node in members if not inside.issuperset(node.users)]
    return copy_of(members, inputs, tuple(results)), inputs, results


def copy_of(members: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Any) -> fx.Graph:
    """Return a graph of copies of `members`.

    Args:
        members: nodes in graph order.
        inputs: the nodes that become its placeholders, in order: all that the members read and that are not members.
        results: what it returns: a member, or a tuple of members.
    """
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.node.map_arg(results, copies.__getitem__))
    return graph


def replace_by_call(
    outer: fx.Graph, name: str, inputs: Sequence[fx.Node | int], members: Sequence[fx.Node], results: Sequence[fx.Node]
) -> None:
    """Replace the nodes `members` of `outer` by one call of the module's method `name`.

    Args:
        outer: the graph, changed in place.
        name: of the method.
        inputs: its arguments.
        members: the nodes that it stands for; they may be dropped, so nothing but `results` may be read outside.
        results: what it returns: a tuple, or the bare value if there is one result.
    """
    inside = set(members)
    with outer.inserting_after(members[-1]):
        call = outer.call_module(name, tuple(inputs))
    values = [call]
    if len(results) != 1:
        with outer.inserting_after(call):
            values = [outer.call_function(operator.getitem, (call, i)) for i in reversed(range(len(results)))][::-1]
    for node, value in zip(results, values, strict=True):
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(members):
        outer.erase_node(node)


def forward_of(gm: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Return `graph` as a function of a module with the tensors and methods of `gm`, and of its inputs.

    The graph is changed, and no pass can run on it afterwards.
    """
    call_directly(graph)
    return type(fx.GraphModule(gm, graph)).forward


_functions: weakref.WeakValueDictionary[Any, Callable[..., Any]] = weakref.WeakValueDictionary()


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """Return `graph`, which reads no attributes of a module, as a function of None and of its inputs.

    Graphs that compute the same by the same operations have one function, whatever their nodes are called. So
    `torch.compile` compiles the function of equal layers once.
    """
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    members = [node for node in nodes if node.op not in ("placeholder", "output")]
    return function_of_nodes(members, inputs, graph.output_node().args[0])


def function_between(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> Callable[..., Any]:
    """Return the function of the graph that `extract` makes, without making it if a graph of equal nodes has one."""
    return function_of_nodes(_between(inputs, results), inputs, tuple(results))


def function_of_nodes(members: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Any) -> Callable[..., Any]:
    """Return the function of the graph that `copy_of` makes, without making it if a graph of equal nodes has one.

    The layers of a deep model have one function, and to compare their nodes takes a fifth of the time of copying them.
    """
    key = _structure(members, inputs, results)
    function = _functions.get(key)
    if function is None:
        numbered = _numbered(members, inputs, results)
        call_directly(numbered)
        function = _functions[key] = type(fx.GraphModule(nn.Module(), numbered)).forward
    return function


def _structure(members: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Any) -> Hashable:
    """Return a key that functions have in common that compute the same by the same operations."""
    places = {node: index for index, node in enumerate((*inputs, *members))}

    def operand(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return places[value]
        if isinstance(value, (tuple, list)):
            return isinstance(value, list), *map(operand, value)
        if isinstance(value, dict):
            return dict, *((name, operand(item)) for name, item in value.items())
        if isinstance(value, slice):
            return slice, operand(value.start), operand(value.stop), operand(value.step)
        if isinstance(value, (bool, int, float, complex)):
            return type(value), repr(value)  # because 1, 1.0 and True are equal, and so are 0.0 and -0.0
        return value  # type: ignore[no-any-return]

    lines = [(node.op, node.target, operand(node.args), operand(node.kwargs)) for node in members]
    return len(inputs), tuple(lines), operand(results)


def _numbered(members: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Any) -> fx.Graph:
    """Return a graph of copies of `members` that are named by their position."""
    numbered = fx.Graph()
    copies = {node: numbered.placeholder(f"a{index}") for index, node in enumerate(inputs)}
    for index, node in enumerate(members, len(inputs)):
        args = fx.node.map_arg(node.args, copies.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, copies.__getitem__)
        copies[node] = numbered.create_node(node.op, node.target, args, kwargs, name=f"a{index}")
    numbered.output(fx.node.map_arg(results, copies.__getitem__))
    return numbered
