"""The modes of modules: what a graph computes in another way in training than in evaluation.

Each module has a mode of its own. A node whose operation depends on it reads the flag of the module that ran the
operation: `layers.0.drop.training`. So flags are read like tensors, in each call and from the host's own modules.

A model may run other operations in training than in evaluation, such as stochastic depth. Its graph then has both, over
the same tensors, and chooses among the results. A program is for one mode, and has only the operations of that mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..errors import CallError
from .tensors import module_at
from .walk import ancestors
from .writes import statistics_flag, updates_statistics, written_roots

FLAG = "training"
"""The name of the attribute of a module that says in which mode it is. No parameter, buffer or child can have it."""


def is_flag(node: object) -> bool:
    """Check whether `node` reads the mode of a module."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).rpartition(".")[2] == FLAG


def parts_with_flags(graph: fx.Graph) -> set[str]:
    """Return the qualified names of the modules whose modes `graph` reads."""
    return {str(node.target).rpartition(".")[0] for node in graph.nodes if is_flag(node)}


def flag_name(path: str) -> str:
    """Return the qualified name of the flag of the module at `path`."""
    return f"{path}.{FLAG}" if path else FLAG


def owner_of(node: fx.Node) -> str:
    """Return the qualified name of the innermost module in whose `forward` the operation of `node` ran.

    A node that torch.export knows no module of, such as one that makes a tensor, is in that of the first that reads it.
    """
    while stack := node.meta.get("nn_module_stack"):
        path, kind, *_ = next(reversed(stack.values()))
        if path != kind:  # where it knows none, torch.export writes a mark in the places of both the name and the class
            return str(path)
        if not node.users:
            break
        node = next(iter(node.users))
    return ""


def read_flag(graph: fx.Graph, path: str) -> fx.Node:
    """Return the node that reads the mode of the module at `path`; make it at the beginning of `graph` if need be."""
    name = flag_name(path)
    node: fx.Node
    for node in graph.find_nodes(op="get_attr"):
        if node.target == name:
            return node
    with graph.inserting_before(next(iter(graph.nodes))):
        return graph.create_node("get_attr", name)


def begin_with(graph: fx.Graph, flags: Sequence[fx.Node]) -> fx.Node:
    """Move nodes that read modes to the beginning of `graph`, as those of adapters stand at sites; return the last."""
    for flag in reversed(flags):
        if (first := next(iter(graph.nodes))) is not flag:
            first.prepend(flag)
    return flags[-1]


def add_flagged_modules(gm: nn.Module, graph: fx.Graph) -> None:
    """Let `gm` have a module wherever `graph` reads a flag: a plain one, in the mode of the module around it."""
    for node in filter(is_flag, graph.nodes):
        module_at(gm, str(node.target).rpartition(".")[0])


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Return the mode of each module of `model`, under all of its names."""
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Put each module of `model` in its mode by `modes`; one that is not there, in the mode of the module around it."""
    for name, module in model.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        module.training = modes[name]


def put_in_mode(model: nn.Module, training: bool) -> None:
    """Put all modules of `model` in a mode, also those that its own `train` leaves in another one."""
    model.train(training)
    for module in model.modules():
        module.training = training


def held_modes(model: nn.Module) -> dict[bool, list[str]]:
    """Return the modules that `train(True)` and `train(False)` of `model` leave in the other mode, by that argument.

    A model may have a `train` of its own that keeps a part of it frozen.

    Args:
        model: is left in another mode, if it has such a method.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return {}
    modes, held = modes_of(model), {}
    for training in (True, False):
        set_modes(model, modes)
        model.train(training)
        held[training] = [name for name, mode in modes_of(model).items() if mode is not training]
    return held


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` in a mode for the body, and each of its modules in its own again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return the value of the mode."""
    return in_training if training else in_evaluation


def one_mode(paths: Sequence[str], others: Sequence[str], *flags: bool) -> bool:
    """Return the mode that parts have in common, on which together it depends what the graph runs.

    Args:
        paths: the qualified names of the parts.
        others: parts that may be in evaluation mode in any case.
        flags: the modes of all of these.

    Raises:
        CallError: the parts are in different modes; or one of the others is in training mode, and they are not.
    """
    mode = flags[0]
    if not all(flags[: len(paths)]) if mode else True in flags:
        named = [*zip((*paths, *others), flags, strict=True)]
        first = {flag: path or "the model itself" for path, flag in reversed(named)}
        raise CallError(
            f"{first[True]} is in training mode and {first[False]} in evaluation mode. This graph takes no calls where"
            " such parts differ. The model computes something in one of them by the mode of another; or it runs other"
            " operations in training, as stochastic depth does. The way out:"
            " put them in one mode, by train() or eval(). For dropout in evaluation (MC dropout), capture the model"
            " with a rate of 0 for stochastic depth (drop_path_rate=0 in its config). Or use wrap in place of rewrite,"
            " which runs the model's own code."
        )
    return mode


def parts_with_modes(graph: fx.Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the parts on whose mode it depends what `graph` chooses by `by_mode`, as `one_mode` takes them."""
    choice: Any = next((node for node in graph.nodes if node.target is by_mode), None)
    return choice.args[0].args[:2] if choice is not None else ((), ())


def let_modes_be_one(gm: fx.GraphModule, paths: Iterable[str]) -> None:
    """Let the graph of `gm` take calls alone in which all parts are in one mode, in place.

    Args:
        gm: gets a module at each of the paths.
        paths: the qualified names of all parts whose modes the model may read.
    """
    graph, flags = gm.graph, [node for node in gm.graph.nodes if is_flag(node) or node.target is one_mode]
    names = tuple(paths)
    read = [read_flag(graph, path) for path in names]
    with graph.inserting_after(begin_with(graph, read)):
        common = graph.call_function(one_mode, (names, (), *read))
    for flag in flags:
        flag.replace_all_uses_with(common, delete_user_cb=lambda user: user is not common)
    add_flagged_modules(gm, graph)
    gm.recompile()


def writes_outside(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether `node` changes a tensor that the graph did not make: one of its module, or an input."""
    return any(root.op in ("get_attr", "placeholder") for root in written_roots(gm, node))


def has_modes(graph: fx.Graph) -> bool:
    """Tell whether `graph` chooses among values by the mode of its parts."""
    return any(node.target is by_mode for node in graph.nodes)


def keep_mode(gm: fx.GraphModule, graph: fx.Graph, training: bool) -> None:
    """Leave only what `graph` computes in one mode, in place; random operations of the other are not run either.

    Args:
        gm: has the modules that `graph` calls.
        graph: its own, or another one.
        training: the mode.
    """
    if not has_modes(graph):
        return
    for node in [node for node in graph.nodes if node.target is by_mode]:
        node.replace_all_uses_with(node.args[1 if training else 2])
        graph.erase_node(node)
    written = {node: roots for node in graph.nodes if (roots := written_roots(gm, node))}
    writes = {node: roots for node, roots in written.items() if not writes_outside(gm, node)}

    def has_effects(node: fx.Node) -> bool:
        if node.op == "call_module" or node.is_impure(impure_random=False):
            return True
        return training and statistics_flag(node) is not False if updates_statistics(node) else node in written

    needed = set(ancestors(node for node in graph.nodes if node not in writes and has_effects(node)))
    while more := [node for node, roots in writes.items() if node not in needed and not needed.isdisjoint(roots)]:
        needed |= set(ancestors(more))
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
