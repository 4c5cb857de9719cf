"""The change of a weight by adapters: two factors where they say so, else the matrix, by its singular values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.placement import Placement, refuse_banks
from ..errors import AdapterError
from ..passes import weight_change
from ..sites.site import Site

A_SUM = "A sum of adapters"


@dataclass(frozen=True)
class Factors:
    """A change of a weight, `B A`.

    Args:
        a: `A (..., k, d_in)`.
        b: `B (..., d_out, k)`.
        error: the norm of what it lacks of the change, in norms of the change.
    """

    a: Tensor
    b: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The number of columns of `B`."""
        return self.a.shape[-2]


def known_changes(placed: Sequence[Placement], tensors: nn.Module) -> dict[str, Factors] | None:
    """Return the change of each weight by adapters that are low-rank factors, without a graph that has them.

    Args:
        placed: the adapters in their places, in their order.
        tensors: a module that has their tensors.

    Returns:
        The changes by site; None if one is of another form, so that only a graph tells it.

    Raises:
        AdapterError: one is a bank.
    """
    refuse_banks(placed, A_SUM)
    at_site: dict[str, list[tuple[Tensor, Tensor] | None]] = defaultdict(list)
    for placement in placed:
        at_site[placement.site].append(factors_of(tensors, placement, 1.0))
    sums = {site: joined(known) for site, known in at_site.items()}
    changes = {site: factors for site, factors in sums.items() if factors is not None}
    return changes if len(changes) == len(sums) else None


def linear_sum(
    graph: fx.GraphModule, site: Site, terms: Sequence[tuple[float, Sequence[Placement]]], r: int | None
) -> Factors:
    """Return the sum of the changes of a weight, each with its coefficient."""
    known = [factors_of(graph, placement, factor) for factor, placed in terms for placement in placed]
    if (factors := joined(known, r)) is not None:
        return factors
    return truncated(sum(factor * change_at(graph, site, placed) for factor, placed in terms), r)


def joined(known: Sequence[tuple[Tensor, Tensor] | None], r: int | None = None) -> Factors | None:
    """Return the sum of changes that are factors; None if one is not, or if experts would need a smaller rank."""
    factors = [each for each in known if each is not None]
    if len(factors) < len(known):
        return None
    a, b = torch.cat([a for a, _ in factors], dim=-2), torch.cat([b for _, b in factors], dim=-1)
    if a.shape[-2] <= (r or min(a.shape[-1], b.shape[-2])):
        return Factors(a, b)
    return truncated(b.double() @ a.double(), r) if a.dim() == 2 else None


def factors_of(tensors: nn.Module, placement: Placement, factor: float) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the change by one adapter, times a number; None if its change is of another form."""
    found = placement.local.low_rank_change(placement.namespace(tensors))
    return None if found is None else (found[0], factor * placement.scale * found[1])


def change_at(graph: fx.GraphModule, site: Site, placed: Sequence[Placement]) -> Tensor:
    """Return by how much the adapters `placed` at a site change its weight, `(d_out, d_in)` in float64."""
    if site.experts:
        raise AdapterError(
            f"{site.name!r} is a stack of experts, whose change is known for variants that are two factors alone (LoRA,"
            " PiSSA, OLoRA, EVA), and without a smaller rank."
        )
    matrix, shift = weight_change(graph, site, placed)
    if shift.abs().max() > 1e-12 * (1 + matrix.abs().max()):
        names = " and ".join(dict.fromkeys(type(placement.variant).__name__ for placement in placed))
        raise AdapterError(f"{names} at {site.name!r} changes the bias too, which a LoRA does not.")
    return matrix


def truncated(change: Any, r: int | None) -> Factors:
    """Return factors of a matrix `(d_out, d_in)`: of rank `r`, or of the rank that it has."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    kept = int((s > s[:1] * max(change.shape) * 1e-14).sum()) if r is None else min(r, len(s))
    kept = max(kept, 1)
    root = s[:kept].sqrt()
    total = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[kept:])) / total if total and r is not None else 0.0
    return Factors(root[:, None] * vh[:kept], u[:, :kept] * root, error)
