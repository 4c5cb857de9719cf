"""Fold adapters into frozen weights: compute the weight and bias that replace them, and check that they do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...adapters.accounting import account_for
from ...adapters.beneath import is_beneath, tensors_with
from ...adapters.contract import rehearse
from ...adapters.dependencies import Dependencies
from ...adapters.frozen_linear import FrozenLinear
from ...adapters.placement import Placement, placements, refuse_banks, site_bias, site_weight
from ...adapters.promotion import call_forward
from ...adapters.variant import Variant, adapter_namespace, one_of
from ...errors import AdapterError
from ...sites.kinds.contraction import Contraction
from ...sites.site import Site

_ROUNDINGS = 1024
"""An affine variant may differ by so many roundings of the dtype from what it is folded into."""
_WAY_OUT = " The way out: keep the adapter; files, exports, torch.compile and generation take it like any other."


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
        AdapterError: the graph records an adapter at a site that is not found; or a variant is not affine, see `_fold`;
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
        AdapterError: a variant is not affine, see `_fold`.
    """
    weight, bias = site_weight(gm, site).double(), site_bias(gm, site)
    bias = None if bias is None else bias.double()
    adapters = [_Adapter.of(gm, site, placement) for placement in placed]
    adapters = [replace(adapter, p=_in_float64(adapter.p)) for adapter in adapters]
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
    needs_bias = bias is not None or bool(shift.any())
    merged = _rounded(site, "weight", matrix, weight)
    return merged, _rounded(site, "bias", shift, weight if bias is None else bias) if needs_bias else None


def _folded(site: Site, weight: Tensor, bias: Tensor | None, adapters: list[_Adapter]) -> tuple[Tensor, Tensor]:
    """Return `W'` and `b'` in the type of `weight`."""
    matrix, shift = weight, bias
    tolerance = _ROUNDINGS * torch.finfo(weight.dtype).eps
    with torch.autocast(weight.device.type, enabled=False):
        for index, adapter in enumerate(adapters):
            read = _beneath(adapters[:index], adapter, site, weight, bias)
            frozen = FrozenLinear(lambda x: x, *read, site, training=False)
            folded, added = _fold(adapter.variant, adapter.p, frozen, matrix, shift, tolerance)
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


def _fold(
    variant: Variant, p: Any, frozen: FrozenLinear, weight: Tensor, bias: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return `W'` and `b'` that compute what `variant` computes around `x W^T + b`, and check them.

    They are `b' = f(0)` and `W' = (f(I) - b')^T`. That is right if `forward` is affine in `x` and treats the rows of
    `x` alike, so it is compared with `forward` on the inputs of `_probes`. A function that is affine on all of these
    and not elsewhere escapes: one that changes beyond 1e4, on a set of small probability, or by less than `tolerance`.
    An embedding needs no check, because the rows of `I` are its only inputs.

    Args:
        variant: the config for the site.
        p: its tensors.
        frozen: the frozen linear as `forward` sees it, except for its `call`.
        weight: `W (d_out, d_in)` with the adapters inside this one.
        bias: `b (d_out,)` with these, or None.
        tolerance: the largest deviation, see `_deviation`.

    Raises:
        AdapterError: the variant is not affine in `x`, or its `forward` fails.
    """
    site = frozen.site
    refused = f"{type(variant).__name__} at {site.name!r} cannot be merged"
    if not variant.affine:
        raise AdapterError(f"{refused}, because it is not affine in its input (affine = False).{_WAY_OUT}")
    calls: list[tuple[Any, Tensor, Tensor, Tensor | None]] = []

    def call(x: Any, **given: Tensor) -> Tensor:
        used, added = given.get("weight", weight).to(weight), given.get("bias", bias)
        # A product with a matrix is the same with ordinary inputs, whatever the kind of site.
        calls.append((x, y := nn.functional.linear(x, used, added), used, added))
        return y

    adapted: Callable[[Any], Tensor] = partial(call_forward, variant, call, frozen, p)

    def output(x: Any) -> Tensor:
        try:
            return adapted(x)
        except Exception as error:
            raise AdapterError(
                f"{refused}, because its forward fails on an input of shape {tuple(getattr(x, 'shape', ()))} in"
                f" evaluation: {type(error).__name__}: {error}"
            ) from error

    def rows(x: Any) -> Tensor:
        return output(x).reshape(-1, site.d_out)

    ranks = _ranks(site)
    ones = (1,) * (ranks[0] - 1)
    zeros = weight.new_zeros(*ones, site.d_in)
    y = output(zeros)
    for x, product, used, added in calls:
        if x is zeros and product is y:  # the product itself, with other tensors: these are it, bit for bit
            return used, weight.new_zeros(site.d_out) if added is None else added.to(weight)
    shift = y.reshape(site.d_out)
    identity = site.kind.identity(weight)
    if isinstance(identity, Tensor):
        identity = identity.reshape(*ones[1:], *identity.shape)
    matrix = (rows(identity) - shift).t().contiguous()
    # What is not finite is refused as that, see `_rounded`.
    if site.kind.name == "embedding" or weight.is_meta or not (matrix.isfinite().all() and shift.isfinite().all()):
        return matrix, shift
    for rank in ranks:
        x = _probes(site.d_in, rank).to(weight)
        off = _deviation(rows(x), x.reshape(-1, site.d_in), (matrix, shift), (weight, bias))
        if off > tolerance:
            refusal = AdapterError(
                f"{refused}, because it is not affine in its input: on random inputs, what it computes differs from the"
                f" weight and bias that would replace it by up to {off:.2g} of the output.{_WAY_OUT}"
            )
            if weight.dtype == torch.float64:
                raise refusal
            # It may be rounding: of large terms that cancel out, or of products in TF32.
            try:
                wide = [_in_float64(value) for value in (p, frozen, weight, bias)]
                folded = _fold(variant, wide[0], wide[1], wide[2], wide[3], tolerance)
            except Exception:
                raise refusal from None
            return folded[0].to(weight), folded[1].to(weight)
    return matrix, shift


def _in_float64(value: Any) -> Any:
    """Return a tensor, the tensors of an adapter or a frozen linear in float64."""
    if isinstance(value, FrozenLinear):
        return replace(value, weight=_in_float64(value.weight), bias=_in_float64(value.bias))
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return value if value is None else adapter_namespace({name: _in_float64(t) for name, t in vars(value).items()})


def _deviation(y: Tensor, x: Tensor, folded: tuple[Tensor, Tensor], frozen: tuple[Tensor, Tensor | None]) -> float:
    """Return how far `y` is at most from what the `folded` weight and bias compute of `x`, in sizes of the output.

    The size of an output is its root mean square over inputs of this length, `frozen` terms included, because they may
    have cancelled out and left their rounding.
    """
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    products = [nn.functional.linear(x, weight) for weight, _ in (folded, frozen)]
    biases = [bias for _, bias in (folded, frozen) if bias is not None]
    size = lengths * sum((product / lengths).square().mean(0).sqrt() for product in products)
    size += sum(bias.abs() for bias in biases)
    error = (y - products[0] - folded[1]).abs().nan_to_num(nan=torch.inf)
    return float((error / size.clamp_min(torch.finfo(x.dtype).tiny)).max())


def _ranks(site: Site) -> list[int]:
    """Return the numbers of dimensions that inputs of `site` have in the graph, as a variant sees them."""
    values = [call.x.meta.get("val") for call in site.calls] if site.kind.name == "linear" else []
    own = len(site.kind.inputs) - 1 if isinstance(site.kind, Contraction) else 0
    return sorted({max(value.dim() - own, 2) for value in values if isinstance(value, Tensor)}) or [2]


@lru_cache(maxsize=8)
def _probes(d_in: int, rank: int) -> Tensor:
    """Return random inputs `(..., d_in)` of `rank` dimensions, the same ones each time.

    At each of eight scales, from 1e-3 to 1e4, there are inputs of one sign, of the other, of both, and with about four
    entries that are not zero. So a function is found out that is not affine far from zero or close to it, for one sign,
    or in one coordinate. The rows are spread over all dimensions, so that a function that mixes them is found out too.
    """
    generator = torch.Generator().manual_seed(0)
    on_cpu: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is
    x = torch.randn(8, 4, d_in, generator=generator, **on_cpu)
    x[:, 0].abs_()
    x[:, 1].abs_().neg_()
    x[:, 3] *= torch.rand(8, d_in, generator=generator, **on_cpu) * d_in < 4
    x *= torch.logspace(-3, 4, 8, **on_cpu)[:, None, None]
    batch = [2] * min(rank - 2, 4) + [1] * (rank - 6)
    return x.reshape(*batch, -1, d_in)


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
    if bad.is_meta or not bad.any():
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
