"""Cut a program into what its modules run: each layer at its own path, and the rest of the graph around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..graph.modes import is_flag
from ..graph.parameter_work import first_input, move_to_front
from ..graph.provenance import is_inserted
from ..graph.queries import reads_tensor
from ..graph.subgraph import copy_of, function_between, function_of_nodes, replace_by_call
from ..graph.tensors import has_attribute, tensor_of
from ..graph.walk import ancestors
from .pieces import pieces_of
from .reading import Reader, reader_of, reader_of_modes


@dataclass(frozen=True)
class Values:
    """The values that a piece of a program needs of its module: tensors, and what is computed of them alone.

    Args:
        read: reads the tensors of the module.
        work: `None, *tensors, *constants -> values`; some of the values are the tensors themselves.
        constants: tensors of the graph alone.
    """

    read: Reader
    work: Callable[..., tuple[Any, ...]]
    constants: tuple[Tensor, ...] = ()

    def of(self, module: nn.Module) -> tuple[Any, ...]:
        """Return the values for the tensors that `module` has now."""
        return self.work(None, *self.read(module), *self.constants)


@dataclass(frozen=True)
class Piece:
    """The part of a program that a module runs.

    Args:
        path: qualified name of the module.
        method: the name of the method by which the rest of the program calls it, with the inputs alone.
        values: what it needs of the module.
        modes: reads the modes of the module's parts that it follows.
        graph: computes the results from these modes and values and the inputs. Equal pieces share it.
        rest: `None, *modes, *values, *inputs -> results`, the graph as a function.
        has_more_results: whether there are several.
    """

    path: str
    method: str
    values: Values
    modes: Reader
    graph: fx.Graph = field(compare=False)
    rest: Callable[..., Any]
    has_more_results: bool


def cut(
    gm: fx.GraphModule, host: nn.Module, outer: fx.Graph, name: str, also: Collection[str]
) -> tuple[list[Piece], Values | None]:
    """Replace what modules run, and all reads of tensors, by calls of methods.

    Args:
        gm: the module whose graph it is.
        host: the module whose tensors the program reads, and whose modules it calls: `gm`, or an adapted model.
        outer: the graph, changed in place.
        name: the beginning of the names of the methods.
        also: qualified names of modules outside layers that are to be called too.

    Returns:
        The pieces; and the values that the rest of the graph needs, which the method `<name>_values` is to return:
        None if it needs none. A single value is returned bare.
    """
    _read_first(gm, outer)
    pieces: list[Piece] = []
    graphs: dict[Callable[..., Any], fx.Graph] = {}
    modules = dict(host.named_modules())
    for path, members in pieces_of(gm, outer, also):
        module = modules.get(path)
        if getattr(module, "runs_parts", False):
            assert module is not None
            pieces.append(_cut_piece(module, outer, members, path, f"{name}_piece_{len(pieces)}", graphs))
    return pieces, _cut_values(gm, host, outer, f"{name}_values")


def _read_first(gm: fx.GraphModule, outer: fx.Graph) -> None:
    """Let each tensor and each mode be read once, before the inputs."""
    read = [node for node in outer.nodes if _is_read(gm, node)]
    move_to_front(outer, read)
    by_name: dict[str, fx.Node] = {}
    for node in read:
        if (first := by_name.setdefault(str(node.target), node)) is not node:
            node.replace_all_uses_with(first)


def _is_read(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Check whether `node` reads a tensor or the mode of a module."""
    return is_flag(node) or reads_tensor(gm, node)


def _cut_piece(
    module: nn.Module,
    outer: fx.Graph,
    members: Sequence[fx.Node],
    path: str,
    method: str,
    graphs: dict[Callable[..., Any], fx.Graph],
) -> Piece:
    """Replace what a module runs by a call of the method; take the graph of an equal piece from `graphs`, or add it."""
    members = [_call_as_function(node) for node in members]
    inside = set(members)
    read = dict.fromkeys(operand for node in members for operand in node.all_input_nodes if operand not in inside)
    is_own = _own(module, outer, f"{path}.")
    flags = [node for node in read if is_flag(node) and _has(module, str(node.target), f"{path}.")]
    own = [node for node in read if is_own(node)]
    inputs = [node for node in read if node not in flags and not is_own(node)]
    results = [node for node in members if not inside.issuperset(node.users)]
    results = [*results[-1:], *results[:-1]]  # the last one is its output, as a rule; hooks look there

    returned = results[0] if len(results) == 1 else tuple(results)
    rest = function_of_nodes(members, (*flags, *own, *inputs), returned)
    if rest not in graphs:
        graphs[rest] = copy_of(members, (*flags, *own, *inputs), returned)
    tensors = sorted(node for node in ancestors(own) if node.op == "get_attr")
    names, modes = ([str(node.target).removeprefix(f"{path}.") for node in nodes] for nodes in (tensors, flags))
    values = Values(reader_of(module, names), function_between(tensors, own))
    replace_by_call(outer, method, inputs, members, results)
    return Piece(path, method, values, reader_of_modes(modes), graphs[rest], rest, len(results) > 1)


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is itself an argument."""
    return module(*args, **kwargs)


def _call_as_function(node: fx.Node) -> fx.Node:
    """Let a call of a submodule take the module as an operand, so that the piece reads it as it reads tensors."""
    if node.op != "call_module":
        return node
    graph = node.graph
    with graph.inserting_before(first_input(graph)):
        module = graph.get_attr(str(node.target))
    with graph.inserting_before(node):
        twin = graph.call_function(call, (module, *node.args), node.kwargs)
    twin.meta = node.meta
    node.replace_all_uses_with(twin)
    graph.erase_node(node)
    return twin


def _own(module: nn.Module, outer: fx.Graph, prefix: str) -> Callable[[fx.Node], bool]:
    """Return a function that tells whether a value depends on what `module` has alone."""
    first = first_input(outer)
    known: dict[fx.Node, bool] = {}

    def is_own(node: fx.Node) -> bool:
        if node not in known:
            if node.op == "get_attr":
                known[node] = not is_flag(node) and _has(module, str(node.target), prefix)
            else:
                known[node] = _is_work(node, first) and all(map(is_own, node.all_input_nodes))
        return known[node]

    return is_own


def _has(module: nn.Module, name: str, prefix: str) -> bool:
    """Check whether `module`, all of whose names begin with `prefix`, has what is called `name`."""
    return name.startswith(prefix) and has_attribute(module, name.removeprefix(prefix))


def _is_work(node: fx.Node, first: fx.Node) -> bool:
    """Check whether `node` is parameter work, which stands before `first`, the first input."""
    return node < first and node.op != "get_attr" and is_inserted(node)


def _cut_values(gm: fx.GraphModule, host: nn.Module, outer: fx.Graph, method: str) -> Values | None:
    """Replace the parameter work that is left in `outer`, and its reads of tensors, by one call of a method."""
    first = first_input(outer)
    before: list[fx.Node] = []
    members: set[fx.Node] = set()
    for node in outer.nodes:
        if _is_read(gm, node) or (_is_work(node, first) and members.issuperset(node.all_input_nodes)):
            before.append(node)
            members.add(node)
    start = next(iter(outer.nodes))
    for node in before:
        start.prepend(node)
    for node in reversed(before):
        if not node.users:
            outer.erase_node(node)
            members.remove(node)
    before = [node for node in before if node in members]
    if not before:
        return None
    results = [node for node in before if not members.issuperset(node.users)]
    tensors = [node for node in before if node.op == "get_attr"]
    # An adapted model has none of the constants that capture made: the graph keeps them.
    shared: list[fx.Node] = []
    constants: list[fx.Node] = []
    for node in tensors:
        (shared if has_attribute(host, str(node.target)) else constants).append(node)
    read = reader_of(host, [str(node.target) for node in shared])
    own = tuple(tensor_of(gm, str(node.target)) for node in constants)
    values = Values(read, function_between([*shared, *constants], results), own)
    replace_by_call(outer, method, [], before, results)
    return values
