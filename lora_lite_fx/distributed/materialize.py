"""`materialize`: give an adapted model without data its memory, its frozen weights, and the start of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx

from ..adapters.param_spec import AdapterTensors
from ..adapters.placement import adapter_tensor_names, placements, site_bias, site_weight
from ..adapters.start_values import fill, initialize, initialize_shared
from ..adapters.state import adapter_tensors
from ..compat.torch_modules import change_tensors
from ..errors import AdapterError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.insertion import SHARED
from ..graph.sharded import copy_values, is_dtensor, is_sharded
from ..graph.tensors import register_tensor, tensor_of
from ..sites.finding import find_sites

Graph = TypeVar("Graph", bound=fx.GraphModule)


@torch.no_grad()
def materialize(gm: Graph, load: Callable[[dict[str, Tensor]], object], device: str | torch.device = "cpu") -> Graph:
    """Give a graph that was made on the device "meta" its memory and its values; in place.

    So a model that fits no single device is built without data, adapted, divided by `shard`, and only then filled, each
    process with its parts. All processes call this.

    Args:
        gm: a result of `rewrite` of a model whose parameters are on "meta", sharded or not. Its buffers have values:
            `accelerate.init_empty_weights(include_buffers=False)` builds models so, whose weights `tie_weights` ties.
        load: is called with the frozen tensors by qualified name, and writes to them in place. DTensors are filled by
            `torch.distributed.checkpoint.load`, of which `HuggingFaceStorageReader` reads safetensors. Tied parameters
            come once, by their first name.
        device: of this process.

    Returns:
        The graph, with frozen weights as `load` has left them and adapters at their start.

    Raises:
        AdapterError: it is not such a graph; or `load` has left values of a tensor, in all processes.
    """
    adapter_tensors(gm)
    if not isinstance(gm, AdaptedGraphModule) or not any(tensor.is_meta for tensor in _tensors(gm).values()):
        raise AdapterError(
            f"materialize takes a graph that rewrite made of a model on the device 'meta', not {shown(gm)}."
        )
    if missing := [name for name, buffer in gm.named_buffers() if buffer.is_meta and _is_of_base(gm, name)]:
        raise AdapterError(
            f"materialize: the buffer {missing[0]} is on the device 'meta', and no checkpoint may have it. The way out:"
            " build the model in accelerate.init_empty_weights(include_buffers=False); buffers have their values then."
        )
    empty = [name for name, tensor in _tensors(gm).items() if tensor.is_meta and _is_of_base(gm, name)]
    _give_memory(gm, torch.device(device))
    frozen = {name: tensor_of(gm, name).detach() for name in empty}
    for tensor in frozen.values():
        if tensor.is_floating_point():
            _own(tensor).fill_(torch.nan)
    load(frozen)
    _check(gm, [name for name, tensor in frozen.items() if tensor.is_floating_point() and _own(tensor).isnan().any()])
    _start(gm)
    return gm


def _give_memory(gm: AdaptedGraphModule, device: torch.device) -> None:
    """Give the tensors memory; tied ones, of which `nn.Module._apply` makes several, stay one."""
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    made: dict[int, Tensor] = {}

    def with_memory(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device=device)
        return made[id(tensor)]

    change_tensors(gm, with_memory)
    for first, *others in names.values():
        for name in others:
            register_tensor(gm, name, tensor_of(gm, first))


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    return dict(chain(gm.named_parameters(), gm.named_buffers()))


def _is_of_base(gm: fx.GraphModule, name: str) -> bool:
    return name not in adapter_tensor_names(gm)


def _own(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _check(gm: fx.GraphModule, left: list[str]) -> None:
    said: list[Any] = [left]
    if is_sharded(gm):
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, left)
    if names := sorted({name for each in said for name in each}):
        raise AdapterError(
            f"materialize: load has left {len(names)} of the frozen tensors without values, as {names[0]}. It must"
            " write to the tensors that it gets, in place."
        )


def _start(gm: fx.GraphModule) -> None:
    """Write the start values of all adapters. Those of process 0 count."""
    sites = {site.name: site for site in find_sites(gm)}
    done: set[str] = set()
    for placement in placements(gm):
        site, variant = sites[placement.site], placement.local
        weight, bias, specs = site_weight(gm, site), site_bias(gm, site), variant.tensor_specs(sites[placement.site])
        own = {name: tensor_of(gm, path) for name, path in placement.tensors.items()}
        values = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in own.items()}
        shared = {name: values[name] for name in values if name.startswith(SHARED)}
        for name, tensor in shared.items():
            fill(variant, site, name, specs[name], tensor)
        if shared:
            initialize_shared(variant, site, weight, AdapterTensors(shared))
        initialize(variant, site, weight, AdapterTensors(values), None, bias)
        for name, path in placement.tensors.items():
            if path not in done:
                copy_values(own[name], values[name])
                done.add(path)
