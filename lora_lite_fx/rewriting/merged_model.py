"""Save a graph without adapters, as `merge` returns it, as the files of the model that it was captured from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from ..adapters.placement import site_bias, site_weight
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError, CheckpointError
from ..execution.optimize import execution_of
from ..graph.sharded import refuse_sharded
from ..graph.tensors import outside_inference_mode, register_tensor, tensor_of
from ..passes import MergedSite
from ..sites.finding import find_sites
from ..sites.site import Site
from ..storage.dequantized import DequantizedLinear, StandIn, error_of, restore_quantized, stand_ins
from .merge_into_model import ModelWeights, own_name

_MOST_CHANGED_BY_CALLS = 1e-2
"""How far bitsandbytes may move a weight of four bits, relative to its norm, when it packs it in the first call."""


def save_as_model(gm: fx.GraphModule, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write the model that a graph was captured from, with the weights of the graph, by its own `save_pretrained`.

    A folder that is new has all files or does not appear.

    Args:
        gm: the graph, which has no adapters.
        save_directory: made if it is not there.
        options: for `save_pretrained` of the model, such as `max_shard_size`.

    Raises:
        AdapterError: the model does not exist any more, or its class cannot be loaded with what the graph has.
        CheckpointError: the folder is a file.
    """
    model, folder = model_of_graph(gm), Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. It is unchanged.")
    if options.get("push_to_hub") or (folder.exists() and any(folder.iterdir())):
        model.save_pretrained(folder, **options)  # which removes parts of an older model, and takes its name from there
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora_lite_fx-", dir=folder.parent) as temporary:
        model.save_pretrained(Path(temporary) / "model", **options)
        (Path(temporary) / "model").replace(folder)


@outside_inference_mode()
def model_of_graph(gm: fx.GraphModule) -> Any:
    """Return a copy of the model that a graph without adapters was captured from, with the tensors of the graph.

    Raises:
        AdapterError: the model does not exist any more, or its class cannot be loaded with what the graph has.
    """
    source: Any = execution_of(gm).source()
    if source is None:
        raise AdapterError(
            "save_pretrained of a graph needs the model that it was captured from, which has the config and the class,"
            " and it does not exist any more. The way out: keep the model in a variable until then; or load it again:"
            " llfx.merge(llfx.adapt(model, 'adapter.safetensors')).save_pretrained(folder)."
        )
    refuse_sharded(
        gm, "save_pretrained does not take a graph", "save the adapters, and merge them into the whole model"
    )
    model = shared_copy(source)
    _take_tensors(model, gm)
    weights = ModelWeights(model)
    for site in find_sites(gm):
        _take_site(weights, gm, site)
    if weights.new_biases:
        raise AdapterError(
            f"The graph has a bias at {weights.new_biases[0]}, and {type(model).__name__} has none there, so that"
            " from_pretrained would leave it out. The way out: torch.save(llfx.merge(graph).state_dict(), path)."
        )
    if stand_ins(model) and getattr(model.config, "quantization_config", None) is None:
        raise AdapterError(
            f"{next(iter(stand_ins(model)))} is quantized, and the config of {type(model).__name__} does not say so, so"
            " that from_pretrained could not read it. The way out: a base that from_pretrained has quantized."
        )
    weights.finish()
    restore_quantized(model)
    return model


def _take_tensors(model: nn.Module, gm: fx.GraphModule) -> None:
    """Give `model` the tensors of the graph that have the same names there, and are others."""
    quantized = {name for name, module in model.named_modules() if isinstance(module, StandIn)}
    current = dict(_tensors(model))
    for name, tensor in _tensors(gm):
        if name in current and not _is_same(current[name], tensor) and name.rpartition(".")[0] not in quantized:
            register_tensor(model, name, tensor)


def _take_site(weights: ModelWeights, gm: fx.GraphModule, site: Site) -> None:
    """Give the module of a site the weight and the bias that the graph has there by other names, or computes no more.

    Raises:
        AdapterError: the weight is quantized, and another than the model's.
    """
    module, _, name = weights.module_of(site)
    merged = MergedSite(site, site_weight(gm, site), site_bias(gm, site))
    if site.computed_weight is None:
        if not _is_same(getattr(module, name, None), tensor_of(gm, site.weight)):
            weights.put_weight(merged)
    elif isinstance(module, DequantizedLinear) and (
        "requantised" in vars(gm) or error_of(merged.weight, module) > _MOST_CHANGED_BY_CALLS
    ):
        raise AdapterError(
            f"The weight of {site.name} is quantized, and not the one that the model has. The way out:"
            " llfx.merge(llfx.adapt(graph), requantise=True).save_pretrained(folder), with the graph that has the"
            " adapters."
        )
    if site.bias is not None and site.computed_bias is None:
        current = getattr(module, own_name(site.bias.rpartition(".")[2]), None)
        if not _is_same(current, tensor_of(gm, site.bias)):
            weights.put_bias(merged)


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
