"""Writes in place: which tensors a node overwrites, and which values may share memory."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..compat.torch import OpOverload, pytree, schema_of
from .tensors import attribute_of, tensor_of


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def augmented(target: Any, value: Any) -> Any:
        return operation(target, value)

    augmented.__name__ = augmented.__qualname__ = name
    return augmented


AUGMENTED = {
    name: _augmented(name)
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("ilshift", "irshift", "iand", "ixor", "ior"),
    )
}
"""Augmented assignments as functions of a graph, by the names that they have in `operator` too.

`x += y` writes to a tensor, and only renames a number. `torch.fx` prints `operator.iadd` as the statement itself, which
would also change a number that is read again later.
"""


def own_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Give `model` copies of the buffers of these qualified names."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, tensor_of(model, name).clone())


def written_buffers(gm: fx.GraphModule) -> list[str]:
    """Return the qualified names of the buffers that running `gm` changes."""
    buffers = {name for name, _ in gm.named_buffers()}
    return [name for name in written_tensors(gm) if name in buffers]


def written_tensors(gm: fx.GraphModule) -> list[str]:
    """Return the qualified names of the tensors that running `gm` changes.

    A module that is called may change all of its buffers, as the statistics of a batch norm.
    """
    names = written_attributes(gm)
    for node in gm.graph.find_nodes(op="call_module"):
        names += [f"{node.target}.{name}" for name, _ in gm.get_submodule(str(node.target)).named_buffers()]
    return list(dict.fromkeys(names))


def written_attributes(gm: fx.GraphModule) -> list[str]:
    """Return the qualified names of the tensors that the nodes of `gm` change, also through views of them."""
    names: list[str] = []
    for node in gm.graph.nodes:
        operands = list(written(gm, node))
        for operand in operands:
            if operand.op == "get_attr":
                names.append(str(operand.target))
            elif may_return_a_view(operand):
                # Without a schema, as of a region, the value may be a view of any of the operands.
                count = 1 if isinstance(operand.target, OpOverload) else None
                operands += [value for value in operand.all_input_nodes[:count] if value not in operands]
    return [name for name in dict.fromkeys(names) if not isinstance(attribute_of(gm, name), nn.Module)]


def written_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that a call of an operator, a function or a method changes in place.

    Where it has no schema, names and flags tell. For calls of modules there is `written`.
    """
    if isinstance(node.target, OpOverload):
        values = written_arguments(node.target, node.args, node.kwargs)
    elif node.op not in ("call_function", "call_method"):
        return []
    elif updates_statistics(node):
        values = [*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")]
    elif node.kwargs.get("out") is not None:
        values = pytree.tree_leaves(node.kwargs["out"])
    else:
        name = str(getattr(node.target, "__name__", node.target))
        flags = (*node.args, node.kwargs.get("inplace"))
        writes = name in AUGMENTED or re.search(r"[^_]_$", name) or any(flag is True for flag in flags)
        values = node.all_input_nodes[:1] if writes else []
    return [value for value in values if isinstance(value, fx.Node)]


def updates_statistics(node: fx.Node) -> bool:
    """Tell whether `node` is a call of batch or instance norm, which updates statistics in training."""
    return _name(node) in ("batch_norm", "instance_norm")


def statistics_flag(node: fx.Node) -> Any:
    """Return the argument of a call of batch or instance norm by which it updates its statistics, also as a default."""
    if len(node.args) > 5:
        return node.args[5]
    return node.kwargs.get("training", node.kwargs.get("use_input_stats", _name(node) == "instance_norm"))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that a call of `operator` changes in place, those in lists one by one."""
    names = _written_names(operator)
    if not names:
        return []
    arguments = {**dict(zip((a.name for a in schema_of(operator).arguments), args, strict=False)), **kwargs}
    values = [value for name, value in arguments.items() if name in names and value is not None]
    return [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]


@functools.cache
def _written_names(operator: Any) -> frozenset[str]:
    """Return the names of the arguments that `operator` changes in place."""
    # The schema of batch and instance norm does not say that they update their statistics.
    return frozenset(
        argument.name
        for argument in schema_of(operator).arguments
        if argument.name in ("running_mean", "running_var")
        or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the operands that `node` changes in place, also if it calls a module of `gm`."""
    if node.op != "call_module":
        return written_operands(node)
    return node.all_input_nodes[:1] if getattr(gm.get_submodule(str(node.target)), "inplace", False) else []


# The schemas of these do not say that they may return their input.
_MAY_RETURN_THEIR_INPUT = {torch.ops.aten.dropout.default, torch.ops.aten.type_as.default}


def returns_what_it_writes(node: fx.Node) -> bool:
    """Check whether a node changes its first operand in place and returns it, as `add_` does."""
    if not isinstance(node.target, OpOverload) or len(schema_of(node.target).returns) != 1:
        return False
    result = schema_of(node.target).returns[0].alias_info
    return result is not None and result.is_write and node.args[:1] == tuple(written_operands(node))


def may_return_a_view(node: fx.Node) -> bool:
    """Check whether the value of `node` may share memory with an operand; without a schema it may."""
    return (
        not isinstance(node.target, OpOverload)
        or node.target in _MAY_RETURN_THEIR_INPUT
        or _returns_a_view(node.target)
    )


@functools.cache
def _returns_a_view(operator: Any) -> bool:
    return any(result.alias_info is not None for result in schema_of(operator).returns)


def written_roots(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that made the tensors which `node` changes in place: views are looked through."""
    roots = []
    for operand in written(gm, node):
        while operand.all_input_nodes and may_return_a_view(operand):
            operand = operand.all_input_nodes[0]
        roots.append(operand)
    return roots


def overwrites(gm: fx.GraphModule, graph: fx.Graph | None = None) -> bool:
    """Check whether `gm` changes tensors in place other than its own buffers and its inputs.

    Args:
        gm: the module.
        graph: one that is run on its tensors, if that is not its own.
    """
    nodes = (graph or gm.graph).nodes
    return any(read.op not in ("get_attr", "placeholder") for node in nodes for read in written(gm, node))


def overwritten_tensors(gm: fx.GraphModule, graph: fx.Graph) -> list[tuple[fx.Node | None, list[fx.Node]]]:
    """Return the node that makes each tensor that is written in place, and those that read it up to the last write."""
    made_by: dict[Any, fx.Node] = {}
    seen_by: dict[fx.Node, set[Any]] = {}  # the tensors that a node's value may share memory with
    readers: dict[Any, list[fx.Node]] = {}
    overwritten: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        own = node.target if node.op == "get_attr" else node
        made_by.setdefault(own, node)
        seen_by[node] = {own}
        for read in node.all_input_nodes:
            for tensor in seen_by[read]:
                readers.setdefault(tensor, []).append(node)
            if may_return_a_view(node):
                seen_by[node] |= seen_by[read]
        for operand in written(gm, node):
            overwritten |= {tensor: list(readers[tensor]) for tensor in seen_by[operand]}
        if node.op == "call_module" and any(True for _ in gm.get_submodule(str(node.target)).buffers()):
            overwritten.setdefault(node.target, []).append(node)  # the module's own buffers, which no node makes
    return [(made_by.get(tensor), reading) for tensor, reading in overwritten.items()]
