"""The tensors of a module, by qualified name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from ..compat.torch import FakeTensor
from ..compat.torch_modules import buffers_of, children_of
from ..errors import AdapterError

HALF = (torch.float16, torch.bfloat16)
"""The types that round sums and products to about three digits."""


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` for the body, as tensors made in it can never train. Decorates functions too."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # which switches gradients on
            yield
    else:
        yield


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of that qualified name.

    Raises:
        AdapterError: something else has the name, because another library changed the modules of the model.
    """
    tensor = attribute_of(model, name)
    if not isinstance(tensor, Tensor):
        raise AdapterError(
            f"{name!r} is a {type(tensor).__name__} and not a tensor, because modules of this {type(model).__name__}"
            " were changed after its adapters were inserted, as PEFT's get_peft_model does. The way out: insert all"
            " adapters at once into an unchanged model, adapt(model, [LoRA(r=8), llfx.from_peft_config(config)])."
        )
    return tensor


def has_values(tensor: Tensor) -> bool:
    """Tell whether `tensor` holds numbers, which a stand-in and a tensor on the meta device do not."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def attribute_of(model: nn.Module, name: str) -> Any:
    """Return the attribute of that qualified name.

    Modules are taken from the registries of modules, because an attribute of a module takes ten times as long.
    """
    value: Any = model
    for part in name.split("."):
        children = children_of(value)
        value = children[part] if part in children else getattr(value, part)  # as what a wrapper of torch.compile has
    return value


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor is of a type in which quantized weights are held: integers, or floats of one byte."""
    kind = tensor.dtype
    return kind is not torch.bool and (kind.itemsize == 1 or not (kind.is_floating_point or kind.is_complex))


def has_attribute(model: nn.Module, name: str) -> bool:
    """Check whether `model` has a tensor or a module of that qualified name."""
    try:
        attribute_of(model, name)
    except AttributeError:
        return False
    return True


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Return the qualified names of the parameters and buffers of `model`, by the id of the tensor."""
    return {id(t): name for name, t in itertools.chain(model.named_buffers(), model.named_parameters())}


def name_tensors(gm: fx.GraphModule, names: Mapping[int, str]) -> None:
    """Register the tensors of `gm` that are in `names` under these names, and let the graph read them there.

    Tracing gives names of its own.

    Args:
        names: the names by the id of the tensor.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = getattr(gm, str(node.target), None)
        if (name := names.get(id(tensor))) is not None:
            assert isinstance(tensor, Tensor)
            register_tensor(gm, name, tensor)
            node.target = name


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`; make the modules on the way if need be, in the mode of the module around them."""
    module = root
    for name in path.split(".") if path else ():
        child = getattr(module, name, None)  # a wrapper of torch.compile has it as an attribute
        if not isinstance(child, nn.Module):
            child = nn.Module()
            child.training = module.training
            module.add_module(name, child)
        module = child
    return module


def register_tensor(gm: nn.Module, name: str, tensor: Tensor) -> None:
    """Register `tensor` itself, and not a copy, under a qualified name; make the modules on the way if need be."""
    path, _, leaf = name.rpartition(".")
    module = module_at(gm, path)
    if isinstance(tensor, nn.Parameter):
        buffers_of(module).pop(leaf, None)
        module.register_parameter(leaf, tensor)
    elif leaf in buffers_of(module):  # setattr keeps a buffer that is not persistent as it is
        setattr(module, leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def delete_tensor(gm: nn.Module, name: str) -> None:
    """Take the tensor of that qualified name off its module."""
    path, _, leaf = name.rpartition(".")
    module = gm.get_submodule(path)
    if is_parametrized(module, leaf):
        remove_parametrizations(module, leaf, leave_parametrized=False)
    delattr(module, leaf)


def keep_registration(source: nn.Module, gm: fx.GraphModule) -> None:
    """Register the tensors of `gm` as those of `source` are, because torch.fx registers only what the graph reads.

    Tied parameters get all the names that they have there. Buffers that are not saved there are not saved here.
    """
    saved = source.state_dict(keep_vars=True).keys()
    own = {name for name, _ in source.named_buffers(remove_duplicate=False)}
    for name, buffer in [*gm.named_buffers(remove_duplicate=False)]:
        if name in own and name not in saved:
            path, _, leaf = name.rpartition(".")
            owner = gm.get_submodule(path)
            delattr(owner, leaf)
            owner.register_buffer(leaf, buffer, persistent=False)
    known = {id(parameter) for parameter in gm.parameters()}
    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        if id(parameter) in known and name not in names:
            path, _, leaf = name.rpartition(".")
            module_at(gm, path).register_parameter(leaf, parameter)
