"""Plans: what is to be inserted where, with what variants have observed on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .adapters import site_weight
from .capture import share
from .errors import CaptureError, ConfigError
from .frozen import check_kind
from .passes import ObserveInputs, Observer, Pipeline
from .selection import select
from .site import Site, find_sites
from .tensors import own_written_buffers, tensor_of
from .variant import Statistic, Variant, wide

Batches = Iterable[tuple[Any, ...] | Mapping[str, Any] | Tensor]


@dataclass(frozen=True)
class Plan:
    """An adapter to be inserted.

    Args:
        variant: its config, settled.
        sites: where.
        statistics: what the variant observed there, by qualified name; empty without calibration data.
    """

    variant: Variant
    sites: Sequence[Site]
    statistics: Mapping[str, Statistic] = field(default_factory=dict)


def make_plans(gm: fx.GraphModule, variants: Sequence[Variant], calibration: Batches | None) -> list[Plan]:
    """Select the sites of each variant, run the calibration data, and settle the configs.

    Args:
        gm: the graph to be adapted; it is not changed.
        variants: in the order of insertion.
        calibration: batches for the variants that start from data: each a tuple of positional or a dict of keyword
            arguments, or one tensor. Gone through once, batch after batch.

    Raises:
        SelectionError: a variant's targets match no site.
        ConfigError: a variant does not fit a site, needs data and has none, or no variant starts from data.
        CaptureError: a batch does not fit the graph.
    """
    sites = find_sites(gm)
    chosen = [(variant, select(variant, sites)) for variant in variants]
    statistics: list[dict[str, Statistic]] = [{} for _ in chosen]
    if calibration is not None:
        for variant, targets in chosen:
            for site in targets:
                _check_observable(variant, site)
        observers = [
            {
                site.name: Observer(observe)
                for site in targets
                if (observe := variant.at(site.name).observer(site, wide(site_weight(gm, site)))) is not None
            }
            for variant, targets in chosen
        ]
        if not any(observers):
            names = ", ".join(type(variant).__name__ for variant in variants)
            raise ConfigError(f"calibration was given, but {names} does not start from data; leave it out.")
        _run(gm, observers, calibration)
        statistics = [
            {name: observer.statistic for name, observer in mine.items() if observer.statistic is not None}
            for mine in observers
        ]
    plans = []
    for (variant, targets), seen in zip(chosen, statistics, strict=True):
        settled = variant.settle(targets, seen)
        kept = [site for site in targets if settled.selects(site)]
        for site in kept:
            check_kind(settled.at(site.name), site, tensor_of(gm, site.weight))
        plans.append(Plan(settled, kept, seen))
    return plans


def _check_observable(variant: Variant, site: Site) -> None:
    if site.kind != "linear" and type(variant).observer is not Variant.observer:
        raise ConfigError(
            f"{type(variant).__name__}: only the inputs of plain linears can be observed on calibration data, and"
            f" {site.name!r} is {site.product.article}."
        )


@torch.no_grad()
def _run(gm: fx.GraphModule, observers: Sequence[Mapping[str, Observer]], calibration: Batches) -> None:
    """Run the data through a copy of `gm` that has the observers in it."""
    by_site: dict[str, list[Observer]] = {}
    for mine in observers:
        for name, observer in mine.items():
            by_site.setdefault(name, []).append(observer)
    observed = share(gm)
    own_written_buffers(observed)
    Pipeline((ObserveInputs(by_site),)).run(observed)
    observed.eval()
    count = 0
    for batch in calibration:
        try:
            if isinstance(batch, Mapping):
                observed(**_completed(gm, batch))
            else:
                observed(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
        except Exception as error:
            raise CaptureError(
                f"Calibration batch {count} does not fit the captured model ({type(error).__name__}: {error})."
                " A batch is a tuple of positional arguments or a dict of keyword arguments, as the example inputs are."
            ) from error
        count += 1
    if not count:
        raise ConfigError("calibration holds no batch.")


def _completed(gm: fx.GraphModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with the inputs that a language model's graph takes and that follow from its tokens."""
    inputs = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    ids = batch.get("input_ids")
    missing = {} if ids is None else {"attention_mask": torch.ones_like(ids), "labels": ids}
    return {**{name: value for name, value in missing.items() if name in inputs}, **batch}
