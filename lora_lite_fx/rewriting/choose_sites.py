"""Plan what to insert where: select the sites of each variant, and run the calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from ..adapters.calibration_data import Statistic
from ..adapters.contract import check_contract, finalize
from ..adapters.placement import site_weight
from ..adapters.quantized_base import check_gradients
from ..adapters.selection import select, warn_of_unused_patterns
from ..adapters.start_values import observer_of
from ..adapters.variant import Variant
from ..errors import ConfigError, SelectionError
from ..graph.insertion import DEFAULT
from ..log import phase
from ..passes import Observer
from ..sites.finding import find_sites
from ..sites.site import Site
from ..sites.unmatched import LeftOut, find_left_out
from .calibration import Batches, check_observable, run_calibration
from .unadapted import covered, describe, tell_of_left_out


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


def _observe(
    gm: fx.GraphModule, chosen: Sequence[tuple[Variant, list[Site]]], calibration: Batches
) -> list[dict[str, Statistic]]:
    """Return what each variant observes of its sites on the calibration data, by qualified name."""
    for variant, targets in chosen:
        for site in targets:
            check_observable(variant, site)
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
    run_calibration(gm, observers, calibration)
    return [
        {name: observer.statistic for name, observer in by_site.items() if observer.statistic is not None}
        for by_site in observers
    ]
