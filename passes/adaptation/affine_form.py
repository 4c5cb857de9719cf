"""Fold one adapter into a weight and a bias, and check that they compute what the variant's `forward` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters.frozen_linear import FrozenLinear
from ...adapters.param_spec import AdapterTensors
from ...adapters.promotion import call_forward
from ...adapters.variant import Variant
from ...errors import AdapterError
from ...graph.tensors import has_values
from ...sites.site import Site

_ROUNDINGS = 1024
"""An affine variant may differ by so many roundings of the dtype from what it is folded into."""
_WAY_OUT = " The way out: keep the adapter; files, exports, torch.compile and generation take it like any other."


class Affine(NamedTuple):
    """The weight `(d_out, d_in)` and the bias `(d_out,)` of a linear function; None if it has no bias."""

    weight: Tensor
    bias: Tensor | None


def fold(
    variant: Variant, p: Any, frozen: FrozenLinear, inside: Affine, tolerance: float | None = None
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
        inside: `W` and `b` with the adapters inside this one.
        tolerance: the largest deviation, see `_deviation`.

    Raises:
        AdapterError: the variant is not affine in `x`, or its `forward` fails.
    """
    site, weight = frozen.site, inside.weight
    refused = f"{type(variant).__name__} at {site.name!r} cannot be merged"
    if not variant.affine:
        raise AdapterError(f"{refused}, because it is not affine in its input (affine = False).{_WAY_OUT}")
    tolerance = _ROUNDINGS * torch.finfo(weight.dtype).eps if tolerance is None else tolerance
    products: list[tuple[Any, Tensor, Tensor, Tensor | None]] = []
    output = _output_of(variant, p, frozen, inside, products, refused)
    ranks = _ranks(site)
    ones = (1,) * (ranks[0] - 1)
    zeros = weight.new_zeros(*ones, site.d_in)
    y = output(zeros)
    for x, product, used, added in products:
        if x is zeros and product is y:  # the product itself, with other tensors: these are it, bit for bit
            return used, weight.new_zeros(site.d_out) if added is None else added.to(weight)
    shift = y.reshape(site.d_out)
    identity = site.kind.identity(weight)
    if isinstance(identity, Tensor):
        identity = identity.reshape(*ones[1:], *identity.shape)
    matrix = (output(identity).reshape(-1, site.d_out) - shift).t().contiguous()
    folded = matrix, shift
    # What is not finite is refused as that by the caller.
    is_known = site.kind.is_known_by_identity or not has_values(weight)
    if is_known or not all(bool(value.isfinite().all()) for value in folded):
        return folded
    for rank in ranks:
        x = _probes(site.d_in, rank).to(weight)
        off = _deviation(output(x).reshape(-1, site.d_out), x.reshape(-1, site.d_in), folded, inside)
        if off > tolerance:
            return _folded_in_float64(variant, p, frozen, inside, tolerance, off)
    return folded


def _output_of(
    variant: Variant,
    p: Any,
    frozen: FrozenLinear,
    inside: Affine,
    products: list[tuple[Any, Tensor, Tensor, Tensor | None]],
    refused: str,
) -> Callable[[Any], Tensor]:
    """Return the function that `variant` computes; it adds each product of `base` to `products`, with its tensors."""
    weight, bias = inside

    def base(x: Any, **given: Tensor) -> Tensor:
        used, added = given.get("weight", weight).to(weight), given.get("bias", bias)
        # A product with a matrix is the same with ordinary inputs, whatever the kind of site.
        products.append((x, y := nn.functional.linear(x, used, added), used, added))
        return y

    adapted: Callable[[Any], Tensor] = partial(call_forward, variant, base, frozen, p)

    def output(x: Any) -> Tensor:
        try:
            return adapted(x)
        except Exception as error:
            raise AdapterError(
                f"{refused}, because its forward fails on an input of shape {tuple(getattr(x, 'shape', ()))} in"
                f" evaluation: {type(error).__name__}: {error}"
            ) from error

    return output


def _folded_in_float64(
    variant: Variant, p: Any, frozen: FrozenLinear, inside: Affine, tolerance: float, off: float
) -> tuple[Tensor, Tensor]:
    """Return the result of `fold` in float64, because a deviation may be rounding: of terms that cancel out, or TF32.

    Raises:
        AdapterError: it is not rounding.
    """
    refusal = AdapterError(
        f"{type(variant).__name__} at {frozen.site.name!r} cannot be merged, because it is not affine in its input: on"
        f" random inputs, what it computes differs from the weight and bias that would replace it by up to {off:.2g} of"
        f" the output.{_WAY_OUT}"
    )
    if inside.weight.dtype == torch.float64:
        raise refusal
    try:
        wide = Affine(*map(in_float64, inside))
        weight, bias = fold(variant, in_float64(p), in_float64(frozen), wide, tolerance)
    except Exception:
        raise refusal from None
    return weight.to(inside.weight), bias.to(inside.weight)


def in_float64(value: Any) -> Any:
    """Return a tensor, the tensors of an adapter or a frozen linear in float64."""
    if isinstance(value, FrozenLinear):
        return replace(value, weight=in_float64(value.weight), bias=in_float64(value.bias))
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return value if value is None else AdapterTensors({name: in_float64(t) for name, t in vars(value).items()})


def _deviation(y: Tensor, x: Tensor, folded: tuple[Tensor, Tensor], frozen: Affine) -> float:
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
    values = [call.x.meta.get("val") for call in site.calls] if site.kind.vector_dims else []
    own = site.kind.vector_dims - 1
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
