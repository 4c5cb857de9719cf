"""Plan what to insert where: select the sites of each variant, and run the calibration data."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.calibration_data import Statistic
from ..adapters.contract import check_contract, finalize
from ..adapters.placement import site_weight
from ..adapters.selection import select, warn_of_unused_patterns
from ..adapters.start_values import observer_of
from ..adapters.variant import Variant
from ..capture.shared_copy import shared_copy
from ..errors import CaptureError, ConfigError, SelectionError, shown
from ..graph.insertion import DEFAULT
from ..graph.writes import own_buffers, written_buffers
from ..log import phase, progress
from ..passes import ObserveInputs, Observer, Pipeline
from ..sites.finding import find_sites
from ..sites.site import Site
from ..sites.unmatched import LeftOut, find_left_out
from ..storage.storages import rounds_inputs
from .unadapted import covered, describe, tell_of_left_out

Batches = Iterable[tuple[Any, ...] | Mapping[str, Any] | Tensor]


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to be inserted.

    Args:
        variant: its config, finalized.
        sites: the sites to insert it at.
        statistics: the variant's observations of the sites, by qualified name; empty without calibration data.
        adapter_name: the name of the adapter.
    """

    variant: Variant
    sites: Sequence[Site]
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    adapter_name: str = DEFAULT


def choose_sites(
    gm: fx.GraphModule, adapters: Sequence[tuple[str, Variant]], calibration: Batches | None
) -> list[NewAdapter]:
    """Select the sites of each variant, run the calibration data, and finalize the configs.

    Args:
        gm: the graph to be adapted; it is not changed.
        adapters: the configs in the order of insertion, each with the name of its adapter, see `as_adapters`.
        calibration: batches for the variants that start from data: each a tuple of positional or a dict of keyword
            arguments, or one tensor. They are read once, one after the other.

    Raises:
        SelectionError: a variant's targets match no site.
        ConfigError: gradients do not pass through the frozen weights, a variant does not fit a site or needs data and
            has none, or no variant starts from data.
        CaptureError: a batch does not fit the graph.
    """
    check_gradients(gm)
    with phase("found the sites", "finding the sites") as details:
        sites = find_sites(gm)
        left_out = find_left_out(gm, sites)
        details.append(f"{len(sites)} in the model")
    variants = [variant for _, variant in adapters]
    chosen = [(variant, _select(variant, sites, left_out)) for variant in variants]
    tell_of_left_out(gm, variants, sites, left_out)
    for variant in variants:
        warn_of_unused_patterns(variant, sites, [weight.name for weight in left_out], stacklevel=4)
    statistics: list[dict[str, Statistic]] = [{} for _ in chosen]
    if calibration is not None:
        with phase("ran the calibration data"):
            statistics = _observe(gm, chosen, calibration)
    new_adapters: list[NewAdapter] = []
    for (name, _), (variant, targets), observed in zip(adapters, chosen, statistics, strict=True):
        finalized = finalize(variant, targets, observed)
        kept = [site for site in targets if finalized.selects(site)]
        check_contract(finalized, kept, gm, {site.name for new_adapter in new_adapters for site in new_adapter.sites})
        new_adapters.append(NewAdapter(finalized, kept, observed, name))
    return new_adapters


def check_gradients(model: nn.Module) -> None:
    """Check that gradients pass through the frozen weights of `model`.

    torchao rounds the input of a product with some of its weights to 8 bits (`Int8DynamicActivation...`), and the
    rounding passes no gradient on. Adapters anywhere before such a product would train wrongly, or not at all.

    Raises:
        ConfigError: they do not; the message names a weight.
    """
    parts = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    names = [name for name, part in parts if rounds_inputs(part)]
    if names:
        raise ConfigError(
            f"The base quantizes the inputs of {len(names)} of its products ({', '.join(names[:3])}, ...), and no right"
            " gradient passes through them to adapters, which so cannot be trained. Adapt a base of which only the"
            " weights are quantized (torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig) or that is not quantized,"
            " and quantize the merged model."
        )


def _select(variant: Variant, sites: Sequence[Site], left_out: Sequence[LeftOut]) -> list[Site]:
    """Return the sites that the targets include. The error for none says which weights they include are not sites."""
    try:
        return select(variant, sites)
    except SelectionError as error:
        if missed := covered(variant, left_out):
            raise SelectionError(
                f"{error} Its targets include weights that are not sites: {describe(missed)}."
            ) from error
        raise


# Calibration.


def check_calibration(calibration: object) -> None:
    """Raise `ConfigError` for one batch in place of batches; a tensor would be gone through row by row."""
    if isinstance(calibration, (str, Tensor, Mapping)) or not isinstance(calibration, (Iterable, type(None))):
        example = "batch" if isinstance(calibration, (Tensor, Mapping)) else '{"input_ids": ids}'
        raise ConfigError(
            f"calibration must hold batches, and is {shown(calibration)}. For one batch write calibration=[{example}]."
        )


def _observe(
    gm: fx.GraphModule, chosen: Sequence[tuple[Variant, list[Site]]], calibration: Batches
) -> list[dict[str, Statistic]]:
    """Return what each variant observes of its sites on the calibration data, by qualified name."""
    for variant, targets in chosen:
        for site in targets:
            if site.kind.vector_dims != 1 and type(variant).observer is not Variant.observer:
                raise ConfigError(
                    f"{type(variant).__name__}: only the inputs of plain linears can be observed on calibration data,"
                    f" and {site.name!r} is {site.kind.article}."
                )
    observers = [
        {
            site.name: Observer(observe)
            for site in targets
            if (observe := observer_of(variant.for_site(site.name), site, site_weight(gm, site))) is not None
        }
        for variant, targets in chosen
    ]
    if not any(observers):
        names = ", ".join(type(variant).__name__ for variant, _ in chosen)
        raise ConfigError(f"calibration was given, but {names} does not start from data; leave it out.")
    _run_calibration(gm, observers, calibration)
    return [
        {name: observer.statistic for name, observer in by_site.items() if observer.statistic is not None}
        for by_site in observers
    ]


@torch.no_grad()
def _run_calibration(gm: fx.GraphModule, observers: Sequence[Mapping[str, Observer]], calibration: Batches) -> None:
    """Run the data through a copy of `gm` that has the observers in it, which each variant has by the site's name.

    Raises:
        CaptureError: a batch does not fit the graph.
        ConfigError: there is no batch, or an observer failed.
    """
    by_site: dict[str, list[Observer]] = {}
    for of_variant in observers:
        for name, observer in of_variant.items():
            by_site.setdefault(name, []).append(observer)
    observed = shared_copy(gm)
    own_buffers(observed, written_buffers(observed))
    Pipeline((ObserveInputs(by_site),)).run(observed)
    observed.eval()
    names = list(inspect.signature(gm.forward).parameters)
    count = 0
    for batch in progress(calibration, "calibration"):
        kwargs = _completed(gm, batch) if isinstance(batch, Mapping) else {}
        args = () if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
        for observer in itertools.chain(*by_site.values()):
            observer.begin(count, {**dict(zip(names, args, strict=False)), **kwargs})
        try:
            observed(*args, **kwargs)
        except ConfigError:  # of an observer
            raise
        except Exception as error:
            raise CaptureError(
                f"Calibration batch {count} does not fit the captured model ({type(error).__name__}: {error})."
                " A batch is a tuple of positional arguments or a dict of keyword arguments, as the example inputs are."
            ) from error
        count += 1
    if not count:
        raise ConfigError("calibration holds no batch.")


def _completed(gm: fx.GraphModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return `batch` with the inputs of a language model's graph that follow from the tokens, if they are missing."""
    inputs = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    ids = batch.get("input_ids")
    missing = {} if ids is None else {"attention_mask": torch.ones_like(ids), "labels": ids}
    return {**{name: value for name, value in missing.items() if name in inputs}, **batch}
