"""Find out whether an adapter of another rank and scale can be written in the tensors of a compiled config.

A compiled program has the rank and the scale of its config as constants. Zeros can fill factors of a lower rank up, and
the factor between two scales can go into `B`, if the variant is linear in it. That is tried out, so that it holds for
variants of users too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.adapter_tensors import AdapterTensors
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.variant import Variant
from ..graph.insertion import SHARED
from ..sites.site import Site

_SITE = Site("site", d_in=11, d_out=13)


def scale_of(variant: Variant) -> float:
    """Return the scale of a config for one site: `alpha / r`, or 1 for a variant without alpha."""
    alpha, r = getattr(variant, "alpha", None), getattr(variant, "r", None)
    if alpha is None or r is None:
        return 1.0
    return float(alpha) / (math.sqrt(r) if getattr(variant, "rank_stabilized", False) else r)


@torch.no_grad()
def folding(variant: Variant) -> dict[str, Any] | None:
    """Return how an adapter of another rank and scale is written in the tensors of a config.

    Args:
        variant: the config.

    Returns:
        Under `ranks`, the dimensions that are the rank, from the end, by name of the tensor; under `scaled`, the
        tensors that take the factor between the scales. None if it cannot be written, or the config has no rank.
    """
    known = {field.name for field in fields(variant)}
    if "r" not in known:
        return None
    several: dict[str, Any] = {name: () for name in ("rank_pattern", "alpha_pattern") if name in known}
    large_fields, small_fields = {"r": 4, **several}, {"r": 2, **several}
    if "alpha" in known:
        large_fields["alpha"], small_fields["alpha"] = 3.0, 5.0
    if "rank_stabilized" in known:
        small_fields["rank_stabilized"] = not getattr(variant, "rank_stabilized", False)
    try:
        large, small = (replace(variant, slots=None, **given) for given in (large_fields, small_fields))
        return _tried(large, small)
    except Exception:  # of a variant that does not take these sizes, whatever it raises
        return None


def _tried(large: Variant, small: Variant) -> dict[str, Any] | None:
    of_large, of_small = ({name: spec.shape for name, spec in each.params(_SITE).items()} for each in (large, small))
    if any(spec.dtype is not None for spec in large.params(_SITE).values()):
        return None
    ranks = {
        name: [dim - len(shape) for dim, size in enumerate(shape) if size != of_small[name][dim]]
        for name, shape in of_large.items()
        if shape != of_small[name]
    }
    if any(name.startswith(SHARED) for name in ranks):
        return None
    scaled = [name for name in of_large if name.startswith("lora_B") or name == "lora_bias"]
    generator = torch.Generator().manual_seed(0)
    factor = scale_of(small) / scale_of(large)
    given = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in of_small.items()}
    written = {}
    for name, shape in of_large.items():
        written[name] = torch.zeros(shape, dtype=torch.float64)
        written[name][tuple(slice(0, size) for size in of_small[name])] = given[name]
        if name in scaled:
            written[name] *= factor
    expected, got = _output(small, given), _output(large, written)
    return {"ranks": ranks, "scaled": scaled} if torch.allclose(expected, got, rtol=1e-9, atol=1e-12) else None


def _output(variant: Variant, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what an adapted linear computes in evaluation."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((5, 11), (13, 11), 13))

    def call(value: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return F.linear(value, weight, bias)

    return variant.forward(x, FrozenLinear(call, weight, bias, _SITE), AdapterTensors(tensors))
