"""Which tensors a node overwrites, and which values may share memory."""

from __future__ import annotations

import re

import torch
from torch import fx

from .direct_calls import OpOverload
from .tensors import tensor_of

# Writes.


def own_written_buffers(gm: fx.GraphModule) -> None:
    """Give `gm` copies of the buffers that running it changes (running statistics, counters)."""
    for name in written_buffers(gm):
        path, _, leaf = name.rpartition(".")
        setattr(gm.get_submodule(path), leaf, tensor_of(gm, name).clone())


def written_buffers(gm: fx.GraphModule) -> list[str]:
    """Qualified names of the buffers that running `gm` changes."""
    buffers = {name for name, _ in gm.named_buffers()}
    found: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and getattr(gm.get_submodule(node.target), "track_running_stats", False):
            found += [f"{node.target}.{name}" for name, _ in gm.get_submodule(node.target).named_buffers()]
        for operand in written(gm, node):
            if operand.op == "get_attr" and operand.target in buffers:
                found.append(str(operand.target))
    return list(dict.fromkeys(found))


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that a call of an operator changes in place; of other calls nothing is known."""
    if not isinstance(node.target, OpOverload):
        return []
    given = {**dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)), **node.kwargs}
    # The schema of batch and instance norm does not say that they update their statistics.
    written = {"running_mean", "running_var"} | {
        argument.name
        for argument in node.target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    return [value for name, value in given.items() if name in written and isinstance(value, fx.Node)]


def written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The operands that `node` changes in place. Where no schema says it, as in symbolic traces, names and flags do."""
    if isinstance(node.target, OpOverload):
        return written_operands(node)
    if node.op == "call_module":
        writes = getattr(gm.get_submodule(str(node.target)), "inplace", False)
    else:
        name = str(getattr(node.target, "__name__", node.target))
        if name in ("batch_norm", "instance_norm"):  # they update their statistics
            statistics = (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
            return [value for value in statistics if isinstance(value, fx.Node)]
        flags = (*node.args, node.kwargs.get("inplace"))
        writes = re.search(r"[^_]_$", name) or any(flag is True for flag in flags)
    return node.all_input_nodes[:1] if writes else []


# Their schemas do not say that they may return their input.
_MAY_RETURN_THEIR_INPUT = {torch.ops.aten.dropout.default, torch.ops.aten.type_as.default}


def may_return_a_view(node: fx.Node) -> bool:
    """Whether the value of `node` may share memory with an operand; it may, if nothing is known of it."""
    return (
        not isinstance(node.target, OpOverload)
        or node.target in _MAY_RETURN_THEIR_INPUT
        or any(result.alias_info is not None for result in node.target._schema.returns)
    )


def overwrites(gm: fx.GraphModule) -> bool:
    """Whether `gm` changes anything in place besides its own buffers and its inputs."""
    return any(read.op not in ("get_attr", "placeholder") for node in gm.graph.nodes for read in written(gm, node))
