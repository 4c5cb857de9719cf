"""`parallelize`: tensor parallelism of an adapted graph, whose weights become DTensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ..adapters.placement import placements
from ..adapters.state import adapter_tensors
from ..errors import AdapterError, shown
from ..execution.module import AdaptedGraphModule
from ..graph.divided import put_borders
from ..graph.sharded import is_sharded, is_stage
from ..graph.tensors import register_tensor, tensor_of
from ..sites.finding import find_sites
from ..sites.kinds.linear import SiteKind
from ..sites.site import Site
from .agreement import agree, broadcast_adapters

COLUMNS = ("query", "key", "value", "gate", "up")
ROWS = ("output", "down")


def parallelize(
    gm: fx.GraphModule,
    mesh: DeviceMesh | None = None,
    *,
    columns: Sequence[str] = COLUMNS,
    rows: Sequence[str] = ROWS,
) -> fx.GraphModule:
    """Divide the weights of an adapted graph among processes, each weight by its outputs or its inputs; in place.

    That is tensor parallelism: all processes get the same inputs, compute their part of each layer, and have the whole
    results and gradients. Weights become DTensors, whose operators torch runs on parts; so results are those of one
    process whatever is divided, and `columns` and `rows` decide what is sent: with those of Megatron, the default,
    a layer's heads and inner units stay in their process.

    At a site with divided outputs B is divided and A whole, at one with divided inputs A is divided and B whole; other
    tensors of adapters are whole. `save` is called in all processes, and process 0 writes whole tensors. What changes
    graphs comes before. Adapters start with the values that process 0 has.

    Args:
        gm: a result of `rewrite` or `load`.
        mesh: of the processes, with one dimension. None for all processes, on the device of the model.
        columns: the roles of the linears that are divided by their outputs.
        rows: the roles of those that are divided by their inputs.

    Returns:
        The graph.

    Raises:
        AdapterError: processes are not set up; it is not an adapted graph, or cannot be divided; or processes have
            different models. It is unchanged then, in all processes.
    """
    adapter_tensors(gm)
    if not isinstance(gm, AdaptedGraphModule) or gm.execution is None:
        raise AdapterError(f"parallelize takes a graph that rewrite or load returned, not {shown(gm)}.")
    if not dist.is_initialized():
        raise AdapterError(
            "parallelize: there are no processes to divide the model among. The way out: start the script by torchrun"
            " --nproc-per-node N, and call torch.distributed.init_process_group() in it."
        )
    if mesh is None:
        mesh = init_device_mesh(next(gm.parameters()).device.type, (dist.get_world_size(),))
    problem = _problem_of(gm, mesh)
    places = {} if problem else _places(gm, frozenset(columns), frozenset(rows))
    agree(gm, mesh, problem or ("" if places else f"no linear has a role of {[*columns, *rows]}."), "parallelize")
    broadcast_adapters(gm, mesh)
    known: dict[int, Tensor] = {}
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) not in known:
            known[id(tensor)] = _divided(tensor, mesh, places.get(name, Replicate()))
        register_tensor(gm, name, known[id(tensor)])
    gm.execution = replace(gm.execution, finish=functools.partial(put_borders, mesh=mesh))
    gm.drop_derived()
    return gm


def _divided(tensor: Tensor, mesh: DeviceMesh, place: Placement) -> Tensor:
    # Each process takes its part of its own tensor, because all have the same.
    part = distribute_tensor(tensor.detach(), mesh, [place], src_data_rank=None)
    if not isinstance(tensor, nn.Parameter):
        return part
    parameter = nn.Parameter(part, requires_grad=tensor.requires_grad)
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(_like_the_parameter)
    return parameter


def _like_the_parameter(parameter: Tensor) -> None:
    """Divide the gradient as the parameter is: until then it may be a sum that no process has."""
    assert isinstance(parameter, DTensor)
    if isinstance(parameter.grad, DTensor):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def _places(gm: AdaptedGraphModule, columns: frozenset[str], rows: frozenset[str]) -> dict[str, Placement]:
    """Return how each tensor that is divided is, by qualified name."""
    dims: dict[str, int] = {}  # of W (d_out, d_in) by site
    found: dict[str, Placement] = {}
    for site in find_sites(gm):
        dim = 0 if site.roles & columns else 1 if site.roles & rows else None
        if dim is None or not _can_be_divided(gm, site):
            continue
        dims[site.name] = dim
        found[site.weight] = Shard(1 - dim if site.transposed else dim)
        if dim == 0 and site.bias is not None and site.bias_rows is None:
            found[site.bias] = Shard(0)
    for placement in placements(gm):
        divided = {0: "lora_B", 1: "lora_A"}.get(dims.get(placement.site, -1))
        for name, qualified in placement.tensors.items():
            if placement.variant.slots is None and name == divided:
                found[qualified] = Shard(dims[placement.site])
    return found


def _can_be_divided(gm: AdaptedGraphModule, site: Site) -> bool:
    is_plain = type(site.kind) is SiteKind and site.computed_weight is None
    return is_plain and type(tensor_of(gm, site.weight)) is nn.Parameter and tensor_of(gm, site.weight).dim() == 2


def _problem_of(gm: AdaptedGraphModule, mesh: DeviceMesh) -> str:
    """Return the reason why the graph cannot be divided; empty if it can."""
    assert gm.execution is not None
    if is_sharded(gm) or is_stage(gm):
        return "it is divided already, by fully_shard, parallelize or split."
    if mesh.ndim != 1:
        return f"the mesh has {mesh.ndim} dimensions. The way out: mesh[name], one of them."
    if gm.execution.memory != "fast":
        return (
            "its memory is planned, which measures layers by their whole tensors. The way out: plan_memory(gm, 'fast')."
        )
    random = [node for node in gm.flat_graph.nodes if _draws(node)]
    if random:
        return f"{random[0].name} draws random numbers, which would differ by process. The way out: dropout of 0."
    for name, parameter in gm.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is stored as a {type(parameter).__name__}, which DTensors cannot hold."
    return ""


def _draws(node: fx.Node) -> bool:
    """Check whether `node` draws random numbers: an operator that can, but for dropout of zero."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = {**{a.name: a.default_value for a in target._schema.arguments}, **dict(zip(names, node.args, strict=False))}
    given |= node.kwargs
    return bool(given.get("p", given.get("dropout_p", 1)) != 0)
