"""Take what only evaluation computes into the graph of training, and choose among the results."""

from __future__ import annotations

from collections.abc import Container, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...capture.quiet_torch import failures_unlogged
from ...compat.torch import pytree
from ...graph.modes import by_mode, is_flag, one_mode, owner_of, read_flag, writes_outside
from ...graph.queries import dtype_of
from ...graph.regions import opens_region, regions_of
from ...graph.tensors import has_values
from ...graph.writes import statistics_flag, written, written_roots

aten = torch.ops.aten
_DROPOUT = aten.dropout.default
_BATCH_NORMS = (aten.batch_norm.default, nn.functional.batch_norm)


def take_both(gm: fx.GraphModule, evaluation: fx.Graph) -> int | None:
    """Add to the graph of `gm` what `evaluation` computes otherwise; return the number of nodes added.

    Nodes of evaluation that compute the same as one of training, from the same values and in the same regions, are that
    node. All others are copied. Safe because the copies read the same tensors and inputs, and because a program has one
    mode.

    Args:
        gm: the module over the graph that was captured in training mode.
        evaluation: the graph of the same function in evaluation mode.

    Returns:
        None where the graphs cannot be joined: a mode writes to a buffer that is not a counter, or to an input, or they
        return other results. The graph is then half changed.
    """
    graph = gm.graph
    twin: dict[fx.Node, fx.Node] = {}
    known: dict[tuple[str, str], fx.Node] = {}
    regions = regions_of(graph) | regions_of(evaluation)
    placeholders = iter(graph.find_nodes(op="placeholder"))
    # A tensor that one mode overwrites is not that of the other, and so is nothing that is computed from it.
    overwritten = _overwritten(gm, evaluation)
    # What saves the mode at the beginning of a region is copied, as its end is: else two ends would have one beginning.
    for node in graph.nodes:
        has_effects = node.is_impure() or opens_region(node) or (node.op != "call_module" and written(gm, node))
        if not has_effects and (node.op == "get_attr" or node not in overwritten):
            known.setdefault((_key(node, {}), regions[node]), node)
    shared: set[fx.Node] = set()
    following = _let_follow(gm, evaluation)
    if following is None:
        return None
    of_training = list(graph.nodes)
    output = graph.output_node()
    added = 0
    with graph.inserting_before(output):
        for node in evaluation.nodes:
            if node.op == "placeholder":
                twin[node] = next(placeholders)
            elif node.op == "output" or (node.op == "call_module" and not node.users):
                continue
            elif (same := _same(node, known.get((_key(node, twin), regions[node])), overwritten)) is not None:
                twin[node] = same
                shared.add(same)
            elif "assert" in str(node.target) or "constrain" in str(node.target):  # of sizes, which training has too
                continue
            elif (copied := _copied(gm, node, twin)) is None:
                return None
            else:
                twin[node] = copied
                added += 1
        own = (node for node in evaluation.nodes if twin.get(node) not in shared)
        flag = _flag(graph, (node for node in of_training if node not in shared), own, following)
        theirs = fx.map_arg(evaluation.output_node().args[0], twin.__getitem__)
        results = _choose(graph, flag, output.args[0], theirs)
        if results is None:
            return None
        output.args = (results,)
    return added


def _overwritten(gm: fx.GraphModule, evaluation: fx.Graph) -> set[fx.Node]:
    """Return the tensors that a mode overwrites, but for those that a module does alike in both, as an activation."""
    by_modules: list[dict[str, list[fx.Node]]] = [{}, {}]
    overwritten: set[fx.Node] = set()
    for graph, by_module in zip((gm.graph, evaluation), by_modules, strict=True):
        for node in graph.nodes:
            roots = written_roots(graph.owning_module or gm, node)
            if node.op == "call_module":
                by_module.setdefault(str(node.target), []).extend(roots)
            else:
                overwritten.update(roots)
    for target in by_modules[0].keys() | by_modules[1].keys():
        roots_of_two = [side.get(target, []) for side in by_modules]
        ours, theirs = ([[(user.op, user.target) for user in root.users] for root in roots] for roots in roots_of_two)
        if ours != theirs:
            overwritten.update(*roots_of_two)
    return overwritten


def _same(node: fx.Node, same: fx.Node | None, overwritten: Container[fx.Node]) -> fx.Node | None:
    """Return `same`, a node of training that seems to compute what `node` does, if it reads the same tensors."""
    if same is None:
        return None
    reads_same = _equal(_read(node), _read(same)) if node.op == "get_attr" else node not in overwritten
    return same if reads_same else None


def _copied(gm: fx.GraphModule, node: fx.Node, twin: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """Copy a node of evaluation to where the graph of `gm` inserts; return None if it writes to something outside."""
    only_reads_statistics = node.target in _BATCH_NORMS and statistics_flag(node) is False
    if node.op == "call_module" or (writes_outside(gm, node) and not only_reads_statistics):
        return None
    copied = gm.graph.node_copy(node, twin.__getitem__)
    if node.op == "get_attr" and not _take_what_is_read(gm, node, copied):
        return None
    _revalue(copied)
    return copied


def _flag(
    graph: fx.Graph, in_training: Iterable[fx.Node], in_evaluation: Iterable[fx.Node], following: Iterable[str]
) -> fx.Node:
    """Return the node that says whether the parts are in training mode that run something else in evaluation mode.

    Args:
        graph: gets the node, before its output.
        in_training, in_evaluation: what is computed in one of the modes alone.
        following: the parts whose modes what training computes follows; what evaluation computes does not.
    """
    sides: tuple[dict[str, list[str]], ...] = ({}, {})
    for side, nodes in zip(sides, (in_training, in_evaluation), strict=True):
        for node in nodes:
            if node.op.startswith("call_") and not _follows(node):
                side.setdefault(owner_of(node), []).append(_key(node, {}, operands=False))
    ours, theirs = sides
    paths = tuple(path for path in ours | theirs if ours.get(path) != theirs.get(path)) or ("",)
    others = tuple(path for path in following if path not in paths)
    return graph.call_function(one_mode, (paths, others, *(read_flag(graph, path) for path in (*paths, *others))))


def _key(node: fx.Node, twin: dict[fx.Node, fx.Node], operands: bool = True) -> str:
    """Return what a node computes, and of what, in words; without `operands`, of anything."""
    names = fx.map_arg((node.args, dict(node.kwargs)), lambda read: twin.get(read, read) if operands else None)
    return f"{node.op} {node.target} {names}"


def _equal(left: Any, right: Any) -> bool:
    if left is right or not isinstance(left, Tensor) or not isinstance(right, Tensor) or not has_values(left):
        return bool(left is right)
    if left.data_ptr() == right.data_ptr() and left.shape == right.shape:
        return True
    return left.dtype == right.dtype and torch.equal(left, right)


def _read(node: fx.Node) -> Any:
    return attrgetter(str(node.target))(node.graph.owning_module)


def _take_what_is_read(gm: fx.GraphModule, theirs: fx.Node, ours: fx.Node) -> bool:
    """Let the copy of a node that reads an attribute of the other module read it here; tell whether it can."""
    value = _read(theirs)
    try:
        if _equal(_read(ours), value):
            return True
    except AttributeError:
        pass
    name = f"{str(theirs.target).replace('.', '_')}_in_evaluation"
    if isinstance(value, fx.GraphModule):  # a part of that trace that runs without gradients or in autocast
        gm.add_submodule(name, value)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # a constant of that trace
        gm.register_buffer(name, value, persistent=False)
    else:
        return False
    ours.target = name
    return True


def _let_follow(gm: fx.GraphModule, evaluation: fx.Graph) -> list[str] | None:
    """Let batch norms, their counters and dropouts of training follow the modes of their modules.

    The graph itself runs in either mode, so it must not write in evaluation. And a part may be in evaluation mode in a
    model in training.

    Returns:
        The qualified names of these modules; None if training writes to something else.
    """
    always = {owner_of(node) for node in evaluation.nodes if node.target is _DROPOUT and node.args[2] is True}
    following: dict[str, None] = {}
    for node in list(gm.graph.nodes):
        if node.target in _BATCH_NORMS:
            node.args, node.kwargs = _flag_by_position(node)
            place = 5 if node.args[5] is True else None
        elif writes_outside(gm, node):
            if node.target not in (aten.add_.Tensor, "add_") or node.args[1:] != (1,):
                return None
            place = 1
        else:
            place = 2 if node.target is _DROPOUT and node.args[2] is True and owner_of(node) not in always else None
        if place is not None:
            node.update_arg(place, read_flag(gm.graph, owner_of(node)))
            following[owner_of(node)] = None
    return [*following]


def _flag_by_position(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a batch norm with its flag in the sixth place, where the operator has it."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    others = dict(node.kwargs)
    defaults = {"weight": None, "bias": None, "training": False}
    return (*node.args, *(others.pop(name, defaults.get(name)) for name in names[len(node.args) :])), others


def _follows(node: fx.Node) -> bool:
    """Check whether a node follows the mode of its module, or is the one of evaluation that stands for such a node."""
    return any(map(is_flag, node.all_input_nodes)) or node.target in (*_BATCH_NORMS, _DROPOUT)


def _revalue(node: fx.Node) -> None:
    """Compute the value that stands for the result of a copy anew, because its sizes are those of another trace."""
    if node.op != "call_function":
        return
    values = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: operand.meta.get("val"))
    modes = [value.fake_mode for value in pytree.tree_leaves(values) if hasattr(value, "fake_mode")]
    if not modes:
        return
    try:
        # A region that raises leaves its thread in its own mode.
        with failures_unlogged(), torch.set_grad_enabled(torch.is_grad_enabled()), modes[0]:
            node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator]
    except Exception:  # then the value of the other trace has to do: its sizes are the same in the example
        return


def _choose(graph: fx.Graph, flag: fx.Node, ours: Any, theirs: Any) -> Any:
    """Return the results, each chosen by the mode where it differs; None if the two return other things."""
    if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
        if ours is theirs:
            return ours
        if dtype_of(ours) != dtype_of(theirs):
            return None
        chosen = graph.call_function(by_mode, (flag, ours, theirs))
        chosen.meta["val"] = ours.meta.get("val")
        return chosen
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)) and len(ours) == len(theirs):
        items = [_choose(graph, flag, *pair) for pair in zip(ours, theirs, strict=True)]
        differ = any(item is None and our is not None for item, our in zip(items, ours, strict=True))
        return None if differ else type(ours)(items)
    return ours if type(ours) is type(theirs) and ours == theirs else None
