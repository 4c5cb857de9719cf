"""`model_of_graph`: the model that a graph was captured from, with the tensors that the graph has now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.placement import site_bias, site_weight
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError
from ..execution.optimize import execution_of
from ..graph.modes import modes_of, set_modes
from ..graph.sharded import refuse_sharded
from ..graph.tensors import register_tensor, tensor_of
from ..passes import MergedSite
from ..sites.finding import find_sites
from ..sites.site import Site
from ..storage.dequantized import DequantizedLinear, StandIn
from .merge_into_model import ModelWeights, own_name


def model_of_graph(gm: fx.GraphModule, function: str, way_out: str) -> tuple[Any, list[str]]:
    """Return the model that a graph was captured from, over the graph's tensors and in its modes, without adapters.

    Its class, config and modules are those that the graph remembers. A parameter that the graph does not read is the
    one that the model has, as long as that exists.

    Args:
        gm: the graph.
        function: what needs the model, for messages.
        way_out: what to do where there is no such model.

    Returns:
        The model, a copy that has stand-ins for its quantized modules; and the names of the modules that have a bias
        in the graph, and none in the class of the model.

    Raises:
        AdapterError: the graph does not remember a model, or does not have all of its weights; or it is sharded.
    """
    refuse_sharded(gm, f"{function} does not take a graph", "save the adapters, and load them onto the whole model")
    made_from = execution_of(gm).made_from
    if made_from is None:
        raise AdapterError(
            f"{function} needs the model that the graph was captured from. This graph does not remember it, because it"
            f" comes from a .pt2 file, was not captured here, or has tensors without data. The way out: {way_out}."
        )
    model = shared_copy(made_from.skeleton)
    empty = _take_tensors(model, gm)
    weights = ModelWeights(model)
    for site in find_sites(gm):
        _take_site(weights, gm, site)
    weights.finish()
    current = dict(_tensors(model))
    original = dict(_tensors(made_from.original() or nn.Module()))
    for name in [name for name, tensor in empty.items() if current.get(name) is tensor]:
        if name not in original:
            raise AdapterError(
                f"{function} needs {name}. The graph does not have it, because it does not read it, and the model that"
                f" the graph was captured from does not exist any more. The way out: keep the model; or {way_out}."
            )
        register_tensor(model, name, nn.Parameter(original[name].detach(), requires_grad=False))
    set_modes(model, modes_of(gm))
    return model, weights.new_biases


def _take_tensors(model: nn.Module, gm: fx.GraphModule) -> dict[str, Tensor]:
    """Give `model` the tensors of the graph by name, tied as they are there; return the parameters without values."""
    shared = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach()
        for _, tensor in _tensors(gm)
    }
    own = {name: shared[id(tensor)] for name, tensor in _tensors(gm)}
    devices = {tensor.device for tensor in own.values()}
    quantized = {name for name, module in model.named_modules() if isinstance(module, StandIn)}
    empty: dict[str, Tensor] = {}
    for name, tensor in [*_tensors(model)]:
        if name.rpartition(".")[0] in quantized:
            continue
        if name in own:
            register_tensor(model, name, own[name])
        elif isinstance(tensor, nn.Parameter):
            empty[name] = tensor
        elif len(devices) == 1:
            register_tensor(model, name, tensor.to(next(iter(devices))))
    return empty


def _take_site(weights: ModelWeights, gm: fx.GraphModule, site: Site) -> None:
    """Give the module of a site the weight and the bias that the graph has there by other names, or computes no more.

    Raises:
        AdapterError: the weight is quantized, and another than the model's.
    """
    module, owner, name = weights.module_of(site)
    merged = MergedSite(site, site_weight(gm, site), site_bias(gm, site))
    if site.computed_weight is None:
        if not _is_same(getattr(module, name, None), tensor_of(gm, site.weight)):
            weights.put_weight(merged)
    elif isinstance(module, DequantizedLinear) and not _is_stored(module, owner, gm):
        raise AdapterError(
            f"The weight of {site.name} is quantized, and not the one that the model had when the graph was captured."
            " The way out: llfx.merge(llfx.adapt(graph), requantise=True), with the graph that has the adapters,"
            " returns the model."
        )
    if site.bias is not None and site.computed_bias is None:
        current = getattr(module, own_name(site.bias.rpartition(".")[2]), None)
        if not _is_same(current, tensor_of(gm, site.bias)):
            weights.put_bias(merged)


def _is_stored(module: DequantizedLinear, owner: str, gm: fx.GraphModule) -> bool:
    """Return whether a quantized module stores what the graph has of it."""
    pairs = [(tensor_of(gm, f"{owner}.{name}"), tensor) for name, tensor in module.tensors.items()]
    return all(_is_same(*pair) or (_kind(pair[0]) == _kind(pair[1]) and torch.equal(*pair)) for pair in pairs)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _is_same(one: object, other: Tensor) -> bool:
    """Tell whether a tensor has the same place in memory as another, and the same form there."""
    if one is other:
        return True
    return isinstance(one, Tensor) and (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )
