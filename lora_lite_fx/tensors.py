"""The tensors of a module, by qualified name; and which of them a graph changes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

HALF = (torch.float16, torch.bfloat16)
"""The types in which sums and products are rounded to about three digits."""

# Names.


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    assert isinstance(tensor, Tensor)
    return tensor


def tensor_names(model: nn.Module) -> dict[int, str]:
    """The qualified names of the parameters and buffers of `model`, by the id of the tensor."""
    return {id(t): name for name, t in itertools.chain(model.named_buffers(), model.named_parameters())}


def name_tensors(gm: fx.GraphModule, names: Mapping[int, str]) -> None:
    """Let `gm` read the tensors that have a name by that name, whatever tracing called them."""
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = getattr(gm, str(node.target), None)
        if (name := names.get(id(tensor))) is not None:
            assert isinstance(tensor, Tensor)
            register_tensor(gm, name, tensor)
            node.target = name


def register_tensor(gm: nn.Module, name: str, tensor: Tensor) -> None:
    """Register `tensor`, no copy of it, under a qualified name; the modules on the way are made if need be."""
    path, _, leaf = name.rpartition(".")
    module = gm
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    elif leaf in module._buffers:  # which may not be persistent, and stays so
        setattr(module, leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def registry_of(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where the tensor of that qualified name is registered, and its name there.

    Reading it there, instead of as an attribute, is what a call can afford for every adapter tensor of a model.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    registries = (owner._parameters, owner._buffers, vars(owner))
    return next(registry for registry in registries if leaf in registry), leaf


def keep_aliases(source: nn.Module, gm: fx.GraphModule) -> None:
    """Register the tied parameters of `gm` under all the names they have in `source`; the graph reads only one."""
    known = {id(parameter) for parameter in gm.parameters()}
    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        if id(parameter) in known and name not in names:
            path, _, leaf = name.rpartition(".")
            if path not in dict(gm.named_modules()):
                gm.add_submodule(path, nn.Module())
            gm.get_submodule(path).register_parameter(leaf, parameter)


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
    if not isinstance(node.target, torch._ops.OpOverload):
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
    if isinstance(node.target, torch._ops.OpOverload):
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
        not isinstance(node.target, torch._ops.OpOverload)
        or node.target in _MAY_RETURN_THEIR_INPUT
        or any(result.alias_info is not None for result in node.target._schema.returns)
    )


def overwrites(gm: fx.GraphModule) -> bool:
    """Whether `gm` changes anything in place besides its own buffers and its inputs."""
    return any(read.op not in ("get_attr", "placeholder") for node in gm.graph.nodes for read in written(gm, node))
