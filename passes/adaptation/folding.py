"""Fold adapters into frozen weights: compute the weight and bias that replace them, and check that they do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...adapters.accounting import account_for
from ...adapters.beneath import is_beneath, tensors_with
from ...adapters.contract import rehearse
from ...adapters.dependencies import Dependencies
from ...adapters.frozen_linear import FrozenLinear
from ...adapters.param_spec import one_of
from ...adapters.placement import Placement, placements, refuse_banks, site_bias, site_weight
from ...adapters.variant import Variant
from ...errors import AdapterError
from ...graph.tensors import has_values
from ...sites.site import Site
from .affine_form import Affine, fold, in_float64


@dataclass(frozen=True)
class MergedSite:
    """A site, with the weight and bias that compute what it computes with its adapters.

    Args:
        site: the site.
        weight: `W' (d_out, d_in)` in the frozen dtype; of experts, `(experts, d_out, d_in)`.
        bias: `b' (d_out,)`; of experts, `(experts, d_out)`. None if it is zero and the site has no bias.
    """

    site: Site
    weight: Tensor
    bias: Tensor | None

    def new_weight(self, current: Tensor) -> nn.Parameter:
        """Return the parameter that replaces `current`, the tensor that the site's weight is, or is a part of."""
        return nn.Parameter(self.site.kind.stored(self.weight, current.detach()), requires_grad=False)

    def new_bias(self, current: Tensor | None) -> nn.Parameter | None:
        """Return the parameter that replaces `current`, the tensor of the site's bias; None if there is no bias."""
        if self.bias is None:
            return None
        stored = self.bias if current is None else self.site.stored_bias(self.bias, current.detach())
        return nn.Parameter(stored, requires_grad=False)


@dataclass(frozen=True)
class _Adapter:
    """One adapter of a matrix: its config, tensors, coefficient and name, and what its `forward` reads."""

    variant: Variant
    p: Any
    scale: float
    name: str
    dependencies: Dependencies

    @classmethod
    def of(cls, gm: fx.GraphModule, site: Site, placement: Placement) -> _Adapter:
        """Return the adapter that a graph has at a site."""
        dependencies = rehearse(placement.local, site, gm)
        return cls(placement.local, placement.namespace(gm), placement.scale, placement.adapter_name, dependencies)


@torch.no_grad()
def merge_sites(
    gm: fx.GraphModule, sites: Sequence[Site], coefficients: Mapping[str, float] | None = None
) -> list[MergedSite]:
    """Fold the adapters of `gm` into weights and biases; neither the graph nor its tensors change.

    Where the results go is for the caller to say: `MergeAdapters` puts them into the graph, `fold_into` into a model's
    modules.

    Args:
        gm: a graph with adapters.
        sites: its sites; those without adapters are left out of the result.
        coefficients: by name of an adapter, the number by which it acts; the others do not act. None for all, fully.

    Raises:
        AdapterError: the graph records an adapter at a site that is not found; or a variant is not affine, see `fold`;
            or a merged value is not finite, or too large for the dtype of the base. The message names the site.
    """
    adapted = account_for(gm, sites).adapted("merge")
    by_site: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements(gm):
        scale = placement.scale * (1.0 if coefficients is None else coefficients.get(placement.adapter_name, 0.0))
        if scale:
            refuse_banks([placement], "merge")
            by_site[placement.site].append(replace(placement, scale=scale))
    return [_merge_site(gm, site, by_site[site.name]) for site in adapted if by_site[site.name]]


@torch.no_grad()
def weight_change(gm: fx.GraphModule, site: Site, placed: Sequence[Placement]) -> tuple[Tensor, Tensor]:
    """Return by how much adapters change the weight and the bias of a site, in float64.

    Args:
        gm: the graph.
        site: the site; not experts.
        placed: the adapters there, the innermost first, as if they were alone.

    Returns:
        `(d_out, d_in)` and `(d_out,)`.

    Raises:
        AdapterError: a variant is not affine, see `fold`.
    """
    weight, bias = site_weight(gm, site).double(), site_bias(gm, site)
    bias = None if bias is None else bias.double()
    adapters = [_Adapter.of(gm, site, placement) for placement in placed]
    adapters = [replace(adapter, p=in_float64(adapter.p)) for adapter in adapters]
    matrix, shift = _folded(site, weight, bias, adapters)
    return matrix - weight, shift if bias is None else shift - bias


def _merge_site(gm: fx.GraphModule, site: Site, around: list[Placement]) -> MergedSite:
    weight, bias = site_weight(gm, site), site_bias(gm, site)
    adapters = [_Adapter.of(gm, site, placement) for placement in around]
    if not site.experts:
        return MergedSite(site, *_merge_matrix(site, weight, bias, adapters))
    merged = [
        _merge_matrix(site, matrix, None, [replace(each, p=one_of(each.p, expert)) for each in adapters])
        for expert, matrix in enumerate(weight)
    ]
    has_bias = any(bias is not None for _, bias in merged)
    biases = [matrix.new_zeros(site.d_out) if bias is None else bias for matrix, bias in merged]
    return MergedSite(site, torch.stack([matrix for matrix, _ in merged]), torch.stack(biases) if has_bias else None)


def _merge_matrix(
    site: Site, weight: Tensor, bias: Tensor | None, adapters: list[_Adapter]
) -> tuple[Tensor, Tensor | None]:
    """Return `W'` and `b'` of one matrix `weight (d_out, d_in)` with the `adapters`, the innermost first."""
    # In float32 at least, so that folding into a half-precision weight rounds once.
    exact = torch.promote_types(weight.dtype, torch.float32)
    matrix, shift = _folded(site, weight.to(exact), None if bias is None else bias.to(exact), adapters)
    needs_bias = bias is not None or not has_values(shift) or bool(shift.any())
    merged = _rounded(site, "weight", matrix, weight)
    return merged, _rounded(site, "bias", shift, weight if bias is None else bias) if needs_bias else None


def _folded(site: Site, weight: Tensor, bias: Tensor | None, adapters: list[_Adapter]) -> tuple[Tensor, Tensor]:
    """Return `W'` and `b'` in the type of `weight`."""
    matrix, shift = weight, bias
    with torch.autocast(weight.device.type, enabled=False):
        for index, adapter in enumerate(adapters):
            read = _beneath(adapters[:index], adapter, site, weight, bias)
            frozen = FrozenLinear(lambda x: x, *read, site, training=False)
            folded, added = fold(adapter.variant, adapter.p, frozen, Affine(matrix, shift))
            before = added.new_zeros(()) if shift is None else shift
            matrix = torch.lerp(matrix, folded, adapter.scale)
            shift = torch.lerp(before.expand_as(added), added, adapter.scale)
    assert shift is not None
    return matrix, shift


def _beneath(
    inner: list[_Adapter], adapter: _Adapter, site: Site, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias that `adapter` reads around those of `inner` that count as its linear's."""
    if not adapter.dependencies.tensors:
        return weight, bias
    for below in inner:
        if not is_beneath(below.name, below.dependencies.replaces, adapter.name):
            continue
        scale = 1.0 if below.name == adapter.name else below.scale
        new, added = tensors_with(below.variant, below.p, site, weight, bias)
        weight = torch.lerp(weight, new.to(weight), scale)
        bias = bias if bias is None or added is None else torch.lerp(bias, added.to(bias), scale)
    return weight, bias


def _rounded(site: Site, name: str, exact: Tensor, frozen: Tensor) -> Tensor:
    """Return a merged tensor in the dtype of the weight.

    Args:
        site: its site, and `name` its name there, for the message.
        exact: its values in float32 at least.
        frozen: the frozen tensor, whose dtype the result has.

    Raises:
        AdapterError: a value is not finite, or too large for the dtype.
    """
    rounded = exact.to(frozen.dtype)
    bad = ~torch.isfinite(rounded.to(exact.dtype))
    if not has_values(bad) or not bad.any():
        return rounded
    count = f"{int(bad.sum())} of {bad.numel()} values of the merged {name} of {site.name!r}"
    if torch.isfinite(exact[bad]).all():
        raise AdapterError(
            f"{count} are too large for {frozen.dtype}: up to {exact[bad].abs().max():.4g}, and it holds"
            f" {torch.finfo(frozen.dtype).max:.4g}. Merge into a wider base, model.to(torch.bfloat16) or model.float()."
        )
    raise AdapterError(
        f"{count} are NaN or infinite, because some of its adapters or of its frozen tensors are. If training has"
        " diverged, take an earlier state."
    )
