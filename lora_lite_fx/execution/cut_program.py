"""Cut a program into what its modules run: each layer at its own path, and the rest of the graph around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..capture.graph_calls import further_inputs
from ..graph.insertion import is_inserted
from ..graph.layers import pieces_of
from ..graph.modes import is_flag
from ..graph.parameter_work import first_input, move_to_front
from ..graph.subgraph import copy_of, function_between, function_of_nodes, replace_by_call
from ..graph.tensors import attribute_of, has_attribute
from ..graph.walk import ancestors
from .layer_modules import Part
from .tensor_reader import Reader, Values, reader_of, reader_of_modes


@dataclass
class Piece:
    """The part of a program that a module runs.

    Args:
        path: qualified name of the module.
        values: what it needs of the module.
        modes: reads the modes of the module's parts that it follows.
        graph: computes the results from these modes and values and the inputs. Equal pieces share it.
        rest: `None, *modes, *values, *inputs -> results`, the graph as a function.
        unseen: how many of the first inputs are no activations, so that hooks on the module must not see them.
        has_more_results: whether there are several.
        part: what the module runs, which `derive_program` makes of all this.
    """

    path: str
    values: Values
    modes: Reader
    graph: fx.Graph
    rest: Callable[..., Any]
    unseen: int
    has_more_results: bool
    part: Part = field(init=False)


def cut(
    gm: fx.GraphModule, host: nn.Module, outer: fx.Graph, also: Collection[str]
) -> tuple[list[Piece], Values | None]:
    """Replace what modules run by `self.run_piece(number, *inputs)`, and all reads by one `self.read_values()`.

    Args:
        gm: the module whose graph it is.
        host: the module whose tensors the program reads, and whose modules it calls: `gm`, or an adapted model.
        outer: the graph, changed in place.
        also: qualified names of modules outside layers that are to be called too.

    Returns:
        The pieces by number; and the values that the rest of the graph needs, None if it needs none. A single value is
        returned bare.
    """
    members_of = pieces_of(gm, outer, also)  # before calls of modules, which may write, are calls of a function
    functions = {node: _call_as_function(node) for node in outer.find_nodes(op="call_module")}
    _read_first(outer)
    independent = _independent(outer)
    pieces: list[Piece] = []
    graphs: dict[Callable[..., Any], fx.Graph] = {}
    modules = dict(host.named_modules())
    for path, members in members_of:
        module = modules.get(path)
        if getattr(module, "runs_parts", False):
            assert module is not None
            nodes = [functions.get(node, node) for node in members]
            pieces.append(_cut_piece(module, outer, nodes, path, len(pieces), graphs, independent))
    return pieces, _cut_values(gm, host, outer)


def _read_first(outer: fx.Graph) -> None:
    """Let each tensor, mode and module be read once, before the inputs."""
    reads = outer.find_nodes(op="get_attr")
    move_to_front(outer, sorted(reads))
    first_of: dict[str, fx.Node] = {}
    for node in sorted(reads):
        if (first := first_of.setdefault(str(node.target), node)) is not node:
            node.replace_all_uses_with(first)


def _cut_piece(
    module: nn.Module,
    outer: fx.Graph,
    members: Sequence[fx.Node],
    path: str,
    number: int,
    graphs: dict[Callable[..., Any], fx.Graph],
    independent: set[fx.Node],
) -> Piece:
    """Replace what a module runs by a call of it; take the graph of an equal piece from `graphs`, or add it."""
    inside = set(members)
    read = dict.fromkeys(operand for node in members for operand in node.all_input_nodes if operand not in inside)
    is_own = _own(module, outer, f"{path}.")
    flags = [node for node in read if is_flag(node) and _has(module, str(node.target), f"{path}.")]
    own = [node for node in read if is_own(node)]
    others = [node for node in read if node not in flags and not is_own(node)]
    unseen = [node for node in others if node in independent]
    inputs = [*unseen, *(node for node in others if node not in independent)]
    results = [node for node in members if not inside.issuperset(node.users)]
    results = [*results[-1:], *results[:-1]]  # the last one is its output, as a rule; hooks look there

    returned = results[0] if len(results) == 1 else tuple(results)
    rest = function_of_nodes(members, (*flags, *own, *inputs), returned)
    if rest not in graphs:
        graphs[rest] = copy_of(members, (*flags, *own, *inputs), returned)
    tensors = sorted(node for node in ancestors(own) if node.op == "get_attr")
    names, modes = ([str(node.target).removeprefix(f"{path}.") for node in nodes] for nodes in (tensors, flags))
    values = Values(reader_of(module, names), function_between(tensors, own))
    replace_by_call(outer, "run_piece", [number, *inputs], members, results)
    return Piece(path, values, reader_of_modes(modes), graphs[rest], rest, len(unseen), len(results) > 1)


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is itself an argument."""
    return module(*args, **kwargs)


def _call_as_function(node: fx.Node) -> fx.Node:
    """Let a call of a submodule take the module as an operand, so that the program reads it as it reads tensors."""
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


def _independent(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that depend on no input of the model.

    Among them are tensors of other modules, and inputs that were added: coefficients of adapters, ids of banks.
    """
    added, found = further_inputs(graph), set[fx.Node]()
    for node in graph.nodes:
        if node.target in added if node.op == "placeholder" else found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _has(module: nn.Module, name: str, prefix: str) -> bool:
    """Check whether `module`, all of whose names begin with `prefix`, has what is called `name`."""
    return name.startswith(prefix) and has_attribute(module, name.removeprefix(prefix))


def _is_work(node: fx.Node, first: fx.Node) -> bool:
    """Check whether `node` is parameter work, which stands before `first`, the first input."""
    return node < first and node.op != "get_attr" and is_inserted(node)


def _cut_values(gm: fx.GraphModule, host: nn.Module, outer: fx.Graph) -> Values | None:
    """Replace the parameter work that is left in `outer`, and its reads, by one call."""
    first = first_input(outer)
    before: list[fx.Node] = []
    members: set[fx.Node] = set()
    for node in outer.nodes:
        if node.op == "get_attr" or (_is_work(node, first) and members.issuperset(node.all_input_nodes)):
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
    reads = [node for node in before if node.op == "get_attr"]
    # An adapted model has none of the constants that capture made: the graph keeps them.
    shared = [node for node in reads if has_attribute(host, str(node.target))]
    constants = [node for node in reads if node not in shared]
    own = tuple(attribute_of(gm, str(node.target)) for node in constants)
    read = reader_of(host, [str(node.target) for node in shared])
    values = Values(read, function_between([*shared, *constants], results), own)
    replace_by_call(outer, "read_values", [], before, results)
    return values
