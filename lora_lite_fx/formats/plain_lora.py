"""What every server of LoRA takes: two factors at each linear, with all scales folded into `B`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.placement import Placement, placements
from ..adapters.variant import Variant
from ..errors import AdapterError
from ..graph.tensors import outside_inference_mode
from ..rewriting.sums import acting, changes, graph_with_adapters
from ..sites.site import Site
from .peft.beside import BESIDE


@dataclass(frozen=True)
class SiteFactors:
    """The change `B A` of the weight of a site.

    Args:
        site: the site.
        a: `A (r, d_in)`.
        b: `B (d_out, r)`.
    """

    site: Site
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of `B`."""
        return self.b.shape[1]


@outside_inference_mode()
@torch.no_grad()
def plain_lora(
    model: nn.Module, runtime: str, adapter: str | None = None, kinds: tuple[str, ...] = ("linear",)
) -> list[SiteFactors]:
    """Return adapters as plain LoRA, exactly.

    Args:
        model: a result of `rewrite`, `adapt` or `load`.
        runtime: the name of what is to read them, for messages.
        adapter: the name of the adapter; None for all that act, by their coefficients.
        kinds: the kinds of sites that the runtime takes.

    Raises:
        AdapterError: a site is of another kind, or the change of its weight does not have a low rank.
        ConfigError: there is no adapter of the name.
    """
    graph = graph_with_adapters(model)
    coefficients = acting(model, adapter)
    variants = _variants([placed for placed in placements(graph) if coefficients.get(placed.adapter_name)], runtime)
    found = []
    for site, factors in changes(graph, coefficients):
        names = " and ".join(type(variant).__name__ for variant in variants[site.name])
        if site.kind.name not in kinds or site.experts:
            raise AdapterError(
                f"{runtime} has LoRA for linears, and {names} is at {site.name!r}, which is {site.kind.article}. The"
                f" way out: leave that site out, or llfx.merge(model)."
            )
        rank, width = factors.rank, min(site.d_in, site.d_out)
        if 2 * rank > width and not all(_has_factors(variant) for variant in variants[site.name]):
            raise AdapterError(
                f"{runtime} has LoRA alone, and {names} changes {site.name!r} by a matrix of rank {rank}, which is not"
                f" low for a weight with {width} on its smaller side. The way out: an approximation,"
                " lora, errors = llfx.to_lora(model, r=16), whose errors say what it leaves out; or llfx.merge(model)."
            )
        found.append(SiteFactors(site, _stored(factors.a), _stored(factors.b)))
    if not found:
        raise AdapterError(f"No adapter acts, so there is none for {runtime}. The way out: active(model, names).")
    return found


def _variants(placed: Iterable[Placement], runtime: str) -> Mapping[str, list[Variant]]:
    """Return the variants at each site."""
    variants: dict[str, list[Variant]] = defaultdict(list)
    for placement in placed:
        variant = placement.variant
        if isinstance(variant, BESIDE):
            raise AdapterError(
                f"{runtime} has LoRA alone, and {type(variant).__name__} trains the tensors of {placement.site!r}"
                " themselves. The way out: llfx.merge(model), or train a LoRA there."
            )
        variants[placement.site].append(variant)
    return variants


def _has_factors(variant: Variant) -> bool:
    """Return whether a variant is two factors, so that its rank is what the user chose."""
    return type(variant).low_rank_change is not Variant.low_rank_change


def _stored(factor: Tensor) -> Tensor:
    """Return a factor in a type that runtimes read."""
    return factor.float() if factor.dtype == torch.float64 else factor
