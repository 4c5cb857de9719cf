"""Check that all processes have the same model, and give them the same adapters."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..adapters.placement import adapter_tensor_names
from ..errors import AdapterError
from ..graph.sharded import is_dtensor
from ..graph.tensors import tensor_of

_COMPARED = 64  # values of a tensor that are compared one by one


def mesh_for(model: nn.Module, mesh: DeviceMesh | None, call: str) -> DeviceMesh:
    """Return the mesh that is given; else one of all processes, on the device of the model.

    Args:
        model: the model.
        mesh: the mesh; None for all processes.
        call: the function that asks, for the message.

    Raises:
        AdapterError: processes are not set up.
    """
    if not dist.is_initialized():
        raise AdapterError(
            f"{call}: there are no processes to divide the model among. The way out: start the script by torchrun"
            " --nproc-per-node N, and call torch.distributed.init_process_group() in it."
        )
    if mesh is not None:
        return mesh
    return init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))


def agree(model: nn.Module, mesh: DeviceMesh, problem: str, call: str) -> None:
    """Check that all processes of the mesh have the same model, and no problem; in all of them or in none.

    Args:
        model: has the same tensors everywhere, by name, type and shape. Frozen ones have the same values.
        mesh: of the processes.
        problem: what this process has found against sharding; empty if nothing.
        call: the function that asks, for the message.

    Raises:
        AdapterError: a process has found something, or has another model.
    """
    descriptions = _descriptions(model)
    for dim in range(mesh.ndim):  # what one dimension of the mesh has found, the next one spreads
        group = mesh.get_group(dim)
        said: list[Any] = [None] * group.size()
        dist.all_gather_object(said, (problem, descriptions), group=group)
        problem = next((found for found, _ in said if found), "") or _disagreement([found for _, found in said])
    if problem:
        raise AdapterError(f"{call}: {problem}")


def _disagreement(descriptions: list[dict[str, str]]) -> str:
    first = descriptions[0]
    for process, other in enumerate(descriptions):
        for name in {**first, **other}:
            one, two = (found.get(name, "missing") for found in (first, other))
            if one != two:
                return (
                    f"processes 0 and {process} have different models: {name} is {one} in one, and {two} in the other."
                    " The way out: load the same base and adapt it by the same config in all processes."
                )
    return ""


def _descriptions(model: nn.Module) -> dict[str, str]:
    adapters = {*adapter_tensor_names(model)}
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: _description(tensor, name not in adapters) for name, tensor in named}


@torch.no_grad()
def _description(tensor: Tensor, with_values: bool) -> str:
    trains = ", trained" if tensor.requires_grad else ""
    text = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device.type}{trains}"
    if not with_values or is_dtensor(tensor) or tensor.device.type == "meta" or not tensor.numel():
        return text
    values = tensor.detach().contiguous()
    if values.element_size() == 1 or values.is_complex():
        values = values.reshape(-1).view(torch.uint8)
    rows = values.reshape(len(values) if values.dim() else 1, -1)
    # A hash of each row, and the first values, because rows of one value have the hash of zeros.
    found = (torch.hash_tensor(rows, dim=1), rows.reshape(-1)[:_COMPARED])
    content = b"".join(each.cpu().view(torch.uint8).numpy().tobytes() for each in found)
    return f"{text} with the hash {hashlib.sha256(content).hexdigest()[:12]}"


@torch.no_grad()
def broadcast_adapters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give the adapters of all processes the values that the first process of the mesh has, in place."""
    for name in adapter_tensor_names(model):
        if tensor_of(model, name).is_meta:
            continue  # without values, which `materialize` gives them
        # As bytes, because not every backend has every type.
        values = tensor_of(model, name).detach().reshape(-1).view(torch.uint8)
        for dim in range(mesh.ndim):
            dist.broadcast(values, group=mesh.get_group(dim), group_src=0)
