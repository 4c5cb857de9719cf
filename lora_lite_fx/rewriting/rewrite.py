"""`rewrite`, `merge` and `remove`: capture a graph, then run passes on it.

`rewrite` takes four steps:

1. Capture the model (`capture`).
2. Plan: select the sites of each variant, and run the calibration data if there is any (`make_plans`).
3. Insert each variant at its sites with the pass `InsertAdapter` (`passes/adapt/insert_adapter.py`).
4. Fill the tensors of the new adapters (`Placement.initialize`).

`merge` and `remove` run one pass each on a copy of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.listing import describe_adapters
from ..adapters.mistakes import not_a_variant
from ..adapters.placement import (
    HasGraphs,
    placements,
    site_bias,
    site_weight,
)
from ..adapters.quantized_base import check_gradients
from ..adapters.state import adapter_tensors
from ..adapters.variant import Variant
from ..capture.capture import Inputs
from ..errors import AdapterError
from ..graph.tensors import outside_inference_mode
from ..log import phase, progress
from ..passes import (
    GraphPass,
    InsertAdapter,
    MergeAdapters,
    Pipeline,
    RemoveAdapters,
    without_gradient,
)
from ..sites.site import Site
from .calibration import Batches, check_calibration
from .capture import capture
from .plan import Plan, make_plans

Config = Variant | Sequence[Variant]


@outside_inference_mode()
def rewrite(
    model: nn.Module | ExportedProgram,
    cfg: Config,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    calibration: Batches | None = None,
    checkpoint_layers: bool | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Capture `model` as a graph and insert adapters into it.

    Args:
        model: any module, which is not changed. A graph that has adapters already gets further ones, around the
            first at sites they share. The first adapters stay trainable, and the new graph has copies of them.
        cfg: a variant, or several to insert in this order.
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
        verify: compare the captured graph with the model on the example inputs before adapters are inserted, as
            `capture` does.

    Returns:
        A graph module over the model's own frozen weights, in the model's mode. Only the adapters' parameters
        require grad.

    Raises:
        CaptureError: the model cannot be captured, the inputs do not fit it, it has no layers to checkpoint, or
            its graph computes something else than it.
        SelectionError: a config's targets match no site.
        ConfigError: `cfg` is not a variant, or does not fit a site.
    """
    variants = as_variants(cfg)
    check_calibration(calibration)
    gm = capture(
        model, example_inputs, dynamic_shapes=dynamic_shapes, checkpoint_layers=checkpoint_layers, verify=verify
    )
    plans = make_plans(gm, variants, calibration)
    _warn_of_no_gradient(gm, plans)
    first = insert_adapters(gm, [(plan.variant, plan.sites) for plan in plans])
    _initialize(gm, plans, first)
    return gm


def _initialize(gm: fx.GraphModule, plans: Sequence[Plan], first: int) -> None:
    """Fill the tensors of the adapters that `plans` asked for, the first of which has the index `first`."""
    sites = {site.name: site for plan in plans for site in plan.sites}
    inserted = [placement for placement in placements(gm) if placement.adapter >= first]
    with phase("computed the adapters' start values"):
        for placement in progress(inserted, "start values"):
            site, plan = sites[placement.site], plans[placement.adapter - first]
            weight, bias = site_weight(gm, site), site_bias(gm, site)
            placement.initialize(gm, site, weight, bias, plan.statistics.get(site.name))


def _warn_of_no_gradient(gm: fx.GraphModule, plans: Iterable[Plan]) -> None:
    """Warn of sites that the model runs without gradient at all their calls, because adapters there cannot train."""
    frozen = without_gradient(gm.graph)
    sites = (site.name for plan in plans for site in plan.sites if all(call.node in frozen for call in site.calls))
    if names := list(dict.fromkeys(sites)):
        warnings.warn(
            f"The model runs {len(names)} of the sites ({', '.join(names[:3])}, ...) under torch.no_grad():"
            " adapters there compute, but get no gradient. exclude_names leaves them out.",
            stacklevel=4,
        )


def merge(model: nn.Module) -> Any:
    """Return the model with its adapters folded into the weights: the base graph node for node, without adapters.

    Args:
        model: a result of `rewrite`, `adapt` or `load`; it is not changed. For an adapted Hugging Face model the
            result is a model of its class.

    Raises:
        AdapterError: the model has no adapters; or a variant is not affine in its input, which random inputs show; or a
            merged value is NaN, infinite or too large for the dtype of the base. The message names the site.
    """
    return _without_adapters(model, MergeAdapters())


def remove(model: nn.Module) -> Any:
    """Return the model without its adapters: the base graph node for node, over the base weights bit for bit.

    Args:
        model: a result of `rewrite`, `adapt` or `load`, or the module of an exported program; it is not changed. For
            an adapted Hugging Face model the result is a model of its class.

    Raises:
        AdapterError: the model has no adapters.
    """
    return _without_adapters(model, RemoveAdapters())


@outside_inference_mode()
def _without_adapters(model: nn.Module, removal: GraphPass) -> Any:
    if isinstance(model, HasGraphs):
        return model.without_adapters(fold=isinstance(removal, MergeAdapters))
    adapter_tensors(model)
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"{type(model).__name__} has no adapters in its graph: wrap put them into its modules. The way out: rewrite"
            " in place of wrap."
        )
    gm = capture(model)
    Pipeline((removal,)).run(gm)
    return gm


def insert_adapters(
    gm: fx.GraphModule,
    chosen: Iterable[tuple[Variant, Iterable[Site]]],
    roles: Mapping[str, frozenset[str]] | None = None,
) -> int:
    """Insert each variant at its sites, in order. The tensors of the adapters are not filled yet.

    Args:
        gm: the graph, which is changed.
        chosen: variants, finalized, with their sites.
        roles: roles of sites by name, if another graph of the model shows more of them than this one.

    Returns:
        The index of the first of these adapters; the others follow.

    Raises:
        ConfigError: gradients do not pass through the frozen weights.
    """
    check_gradients(gm)
    first = 1 + max((placement.adapter for placement in placements(gm)), default=-1)
    passes = (
        InsertAdapter(variant, first + i, tuple(site.name for site in sites), roles or {})
        for i, (variant, sites) in enumerate(chosen)
    )
    with phase("inserted the adapters") as details:
        Pipeline(tuple(passes)).run(gm)
        details += describe_adapters(gm)
    return first


def as_variants(cfg: Config) -> list[Variant]:
    """Return `cfg` as a list.

    Raises:
        ConfigError: `cfg` is empty, or an element is not a variant.
    """
    variants = list(cfg) if isinstance(cfg, Sequence) and not isinstance(cfg, str) else [cfg]
    wrong = [item for item in variants if not isinstance(item, Variant)]
    if wrong or not variants:
        raise not_a_variant(wrong[0] if wrong else cfg)
    return variants
