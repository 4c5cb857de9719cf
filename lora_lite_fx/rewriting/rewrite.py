"""`rewrite`, `merge` and `remove`: capture a graph, then run passes on it.

`rewrite` takes four steps:

1. Capture the model (`capture`).
2. Plan: select the sites of each variant, and run the calibration data if there is any (`choose_sites`).
3. Insert each variant at its sites with the pass `InsertAdapter` (`passes/adaptation/insert_adapter.py`).
4. Give the tensors of the new adapters their start values (`initialize`).

`merge` and `remove` run one pass each on a copy of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..adapters.beneath import is_beneath
from ..adapters.changed_buffers import give_back_buffers, warn_of_moving_buffers
from ..adapters.contract import rehearse
from ..adapters.frozen_site import FrozenSite
from ..adapters.listing import describe_adapters
from ..adapters.named_configs import Config, as_adapters, check_free
from ..adapters.placement import HasGraphs, Placement, adapter_names, next_index, placements
from ..adapters.start_values import initialize
from ..adapters.state import adapter_tensors
from ..adapters.switches import HasSwitches, Switches, coefficients
from ..capture.capture_model import Inputs
from ..errors import AdapterError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.memory_plan import Memory, check_memory, plan_memory
from ..graph.calls_and_traces import collection_put_off
from ..graph.tensors import outside_inference_mode
from ..log import phase, progress
from ..passes import InsertAdapter, MergeAdapters, Pipeline, RemoveAdapters, without_gradient
from ..sites.site import Site, stored_bias, stored_weight
from .capture import capture
from .choose_sites import Batches, NewAdapter, check_calibration, check_gradients, choose_sites
from .requantise import Requantised


@outside_inference_mode()
def rewrite(
    model: nn.Module | ExportedProgram,
    cfg: Config,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    calibration: Batches | None = None,
    checkpoint_layers: bool | None = None,
    memory: Memory | None = None,
    fuse_loss: bool | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Capture `model` as a graph and insert adapters into it.

    Args:
        model: any module, which is not changed. A graph that has adapters already gets further ones, around the
            first at sites they share. The first adapters stay trainable, and the new graph has copies of them.
        cfg: a variant; several to insert in this order; or a dict that names adapters,
            `{"fr": LoRA(r=8), "de": [LoRA(r=8), IA3()]}`. Without a name an adapter is `"default"`. All act, until
            `active` says which. A config of PEFT may stand in the place of a variant, see `from_peft_config`.
        example_inputs: a tuple of positional or a dict of keyword arguments to capture with. Without them, a Hugging
            Face model is captured on inputs made from its config (`input_ids`, `attention_mask`, `labels`; no cache),
            and any other module by symbolic tracing.
        dynamic_shapes: `"auto"` makes every dimension dynamic that can be, None fixes all shapes. Other values are
            passed on to `torch.export.export`.
        calibration: batches for the variants that start from data (`EVA`, `AntiPaSTO`): tuples of positional or dicts
            of keyword arguments. They run through the captured graph once, one after the other. Padding is not
            counted.
        checkpoint_layers: keep only the inputs of each layer for the backward pass, and run the layer again in it.
            That takes less memory and about a third more time, and gives the same gradients. The layers are those
            that `layers` of a config counts. None follows `model`: a Hugging Face model after
            `gradient_checkpointing_enable()` and a graph made with this option checkpoint their layers.
        memory: how much the layers keep for the backward pass, as `plan_memory` says it: `"fast"`, `"balanced"`, a
            part of what autograd keeps, or a number of bytes for each token. None follows `model`, if that is a graph.
        fuse_loss: compute head and loss as one operation in training mode, in calls with labels: a few rows of logits
            at a time, and none for tokens without a label. That takes less time and memory; the result has the loss,
            and `logits` is None. In evaluation mode and in calls without labels all is as ever. Losses other than the
            cross-entropy of a head's logits stay as they are, `llfx.program(gm, "training").meta["report"]` says why.
            None follows `model`, if that is a graph.
        verify: compare the captured graph with the model on the example inputs before adapters are inserted, as
            `capture` does. With False nobody notices a model that asks the process how it is called.

    Returns:
        A graph module over the model's own frozen weights, in the model's mode. Only the adapters' parameters
        require grad.

    Raises:
        CaptureError: the model cannot be captured, the inputs do not fit it, it has no layers to checkpoint, or
            its graph computes something else than it.
        SelectionError: a config's targets match no site.
        ConfigError: `cfg` is not a variant, or does not fit a site; or `memory` is not one of its values.
    """
    adapters = as_adapters(cfg, model)
    check_calibration(calibration)
    if memory is not None:
        check_memory(memory, bool(checkpoint_layers))
    gm = capture(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        checkpoint_layers=checkpoint_layers,
        fuse_loss=fuse_loss,
        verify=verify,
    )
    if memory is not None:
        plan_memory(gm, memory)
    if isinstance(cfg, Mapping):
        check_free(cfg, adapter_names(gm))
    insert_new(gm, choose_sites(gm, adapters, calibration), stacklevel=3)
    if isinstance(gm, HasSwitches) and gm.switches.acting is not None:
        gm.switches = replace(gm.switches, acting=(*gm.switches.acting, *(name for name, _ in adapters)))
    return gm


def insert_new(gm: fx.GraphModule, new_adapters: Sequence[NewAdapter], stacklevel: int = 2) -> None:
    """Insert the adapters that `new_adapters` ask for, with their start values.

    Args:
        gm: the graph, which is changed.
        new_adapters: as `choose_sites` returns them.
        stacklevel: of a warning, as for `warnings.warn`, seen from here.

    Raises:
        ConfigError: as `insert_adapters`.
    """
    _warn_of_no_gradient(gm, new_adapters, stacklevel + 1)
    if not placements(gm):
        warn_of_moving_buffers(gm, stacklevel + 1)
    first = insert_adapters(gm, new_adapters)
    sites = {site.name: site for new_adapter in new_adapters for site in new_adapter.sites}
    present = placements(gm)
    before = [placement for placement in present if placement.adapter < first]
    with phase("computed the adapters' start values"):
        for placement in progress(present[len(before) :], "start values"):
            site, new_adapter = sites[placement.site], new_adapters[placement.adapter - first]
            frozen = _beneath(gm, site, placement, before)  # those that are new too start as the identity
            weight, bias = site.kind.matrix(frozen.weight), site.own_bias(frozen.bias)
            observed, tensors = new_adapter.statistics.get(site.name), placement.namespace(gm)
            initialize(placement.local, site, weight, tensors, observed, bias)


@torch.no_grad()
def _beneath(gm: fx.GraphModule, site: Site, placement: Placement, present: Iterable[Placement]) -> FrozenSite:
    """Return the weight and the bias of `site` that `placement` reads, around the adapters that are `present`."""
    frozen = FrozenSite(site, stored_weight(gm, site), stored_bias(gm, site))
    below = [each for each in present if each.site == site.name]
    if not below or not rehearse(placement.local, site, gm).tensors:
        return frozen
    for each in below:
        replaces = not each.local.slots and rehearse(each.local, site, gm).replaces
        if is_beneath(each.adapter_name, replaces, placement.adapter_name):
            frozen = frozen.with_adapter(each.local, each.namespace(gm))
    return frozen


def _warn_of_no_gradient(gm: fx.GraphModule, new_adapters: Iterable[NewAdapter], stacklevel: int) -> None:
    """Warn of sites that the model runs without gradient at all their calls, because adapters there cannot train."""
    frozen = without_gradient(gm.graph)
    sites = (
        site.name
        for new_adapter in new_adapters
        for site in new_adapter.sites
        if all(call.node in frozen for call in site.calls)
    )
    if names := list(dict.fromkeys(sites)):
        warnings.warn(
            f"The model runs {len(names)} of the sites ({', '.join(names[:3])}, ...) under torch.no_grad():"
            " adapters there compute, but get no gradient. exclude_names leaves them out.",
            stacklevel=stacklevel + 1,
        )


def merge(model: nn.Module | ExportedProgram, *, requantise: bool = False) -> Any:
    """Return the model with its adapters folded into the weights: the base graph node for node, without adapters.

    Those that act are folded, by their coefficients if they are scaled; the others are left out. On a quantized base
    the sites with adapters get dense weights, because a merged weight does not fit the grid of the frozen one.

    Args:
        model: a result of `rewrite`, `adapt` or `load`, or an exported program of one; it is not changed. For an
            adapted Hugging Face model the result is a model of its class. A merged graph of one has `save_pretrained`
            too, which writes the model's own files with the merged weights, as long as the model exists.
        requantise: quantize the merged weights of quantized sites again, in the way of the base. That rounds them,
            often by more than a small adapter changes them. The result has the attribute `requantised`: by site, how
            far the stored weight is from the merged one, as a multiple of its norm.

    Raises:
        AdapterError: the model has no adapters; or a variant is not affine in its input, which random inputs show; or a
            merged value is NaN, infinite or too large for the dtype of the base. The message names the site. Or the
            weights are to be quantized again, and no site is quantized, or a storage cannot do that.
    """
    return _without_adapters(model, fold=True, requantise=requantise)


def remove(model: nn.Module | ExportedProgram) -> Any:
    """Return the model without its adapters: the base graph node for node, over the base weights bit for bit.

    Buffers that training has changed, as the statistics of batch norm, have the base's values again.

    Args:
        model: a result of `rewrite`, `adapt` or `load`, or an exported program of one; it is not changed. For an
            adapted Hugging Face model the result is a model of its class.

    Raises:
        AdapterError: the model has no adapters.

    Warns:
        UserWarning: a graph from a file writes to buffers, whose values in the base are not known.
    """
    removed = _without_adapters(model, fold=False)
    if isinstance(removed, AdaptedGraphModule):
        give_back_buffers(removed)
    return removed


def without_adapters(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without its adapters, and with the buffers as training has changed them."""
    removed: fx.GraphModule = _without_adapters(graph, fold=False)
    return removed


@outside_inference_mode()
def _without_adapters(model: nn.Module | ExportedProgram, fold: bool, requantise: bool = False) -> Any:
    if isinstance(model, ExportedProgram):
        model = model.module()
    if isinstance(model, HasGraphs):
        return model.without_adapters(fold=fold, requantise=requantise)
    adapter_tensors(model)
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"{type(model).__name__} has no adapters in its graph: wrap put them into its modules. The way out: rewrite"
            " in place of wrap."
        )
    store = Requantised(model) if requantise else None
    removal = MergeAdapters(coefficients(model, "merge"), store.by_site if store else {}) if fold else RemoveAdapters()
    gm = capture(model)
    Pipeline((removal,)).run(gm)
    if store is not None:
        vars(gm)["requantised"] = store.errors
    if isinstance(gm, HasSwitches):
        gm.switches = Switches()
    return gm


def insert_adapters(gm: fx.GraphModule, new_adapters: Iterable[NewAdapter]) -> int:
    """Insert the adapters that `new_adapters` ask for, in order. Their tensors are not filled yet.

    Args:
        gm: the graph, which is changed.
        new_adapters: finalized configs with their sites.

    Returns:
        The index of the first of these adapters; the others follow.

    Raises:
        ConfigError: gradients do not pass through the frozen weights.
    """
    first = next_index(gm)
    passes = (
        InsertAdapter(
            new_adapter.variant,
            first + i,
            tuple(site.name for site in new_adapter.sites),
            adapter_name=new_adapter.adapter_name,
        )
        for i, new_adapter in enumerate(new_adapters)
    )
    _insert(gm, passes)
    return first


def insert_placed(
    gm: fx.GraphModule,
    placed: Iterable[Placement],
    roles: Mapping[str, frozenset[str]],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Insert adapters that are placed already, in the order of their indices and with the names of their tensors.

    Args:
        gm: the graph, which is changed.
        placed: where the adapters are. Those at sites that the graph lacks are left out.
        roles: of the sites by name, if another graph of the model shows more of them than this one.
        tensors: theirs, by qualified name. Without them new ones are made, which are not filled.
    """
    passes: dict[int, InsertAdapter] = {}
    for placement in sorted(placed, key=lambda placement: placement.adapter):
        index, name = placement.adapter, placement.adapter_name
        known = passes.get(index) or InsertAdapter(placement.variant, index, (), roles, tensors or {}, name)
        passes[index] = replace(known, names=(*known.names, placement.site))
    _insert(gm, passes.values())


@collection_put_off()
def _insert(gm: fx.GraphModule, passes: Iterable[InsertAdapter]) -> None:
    """Run the passes that insert adapters.

    Raises:
        ConfigError: gradients do not pass through the frozen weights.
    """
    check_gradients(gm)
    with phase("inserted the adapters", "inserting the adapters") as details:
        Pipeline(tuple(passes)).run(gm)
        details += describe_adapters(gm)
