"""The tensors of a module, by qualified name; and which of them a graph changes."""

from __future__ import annotations

import itertools
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
