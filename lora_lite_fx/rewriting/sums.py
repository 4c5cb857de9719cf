"""`combine` and `to_lora`: sums of adapters, and any adapter as a plain `LoRA`.

Both ask by how much adapters change each weight. A sum of low-rank changes is one of the sum of their ranks: the
factors are put side by side, and nothing is rounded. Any other change is a matrix, whose singular values say which rank
it has, and what a smaller one leaves out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.named_configs import check_free, check_name
from ..adapters.placement import Placement, adapter_names, graph_of, placements, refuse_banks
from ..adapters.state import adapter_tensors
from ..adapters.switches import coefficients, known_names
from ..errors import AdapterError, ConfigError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.sharded import refuse_sharded
from ..graph.tensors import outside_inference_mode, tensor_of
from ..sites.site import Site
from ..variants import LoRA
from .choose_sites import NewAdapter
from .factors import A_SUM, Factors, change_at, linear_sum, truncated
from .named import insert_from
from .rewrite import insert_adapters, without_adapters

Method = Literal["linear", "ties", "dare", "dare_ties"]
"""How changes of a weight are summed:

- `linear`: `sum of w_i D_i`.
- `ties`: the entries of each change that are largest, of the sign that most of the sum has (arXiv 2306.01708).
- `dare`: a random part of the entries of each change, divided by the density (arXiv 2311.03099).
- `dare_ties`: a random part of the entries, of the sign that most of the sum has.
"""


@outside_inference_mode()
@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    method: Method = "linear",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, float]:
    """Add a sum of adapters as an adapter of its own, in place: `combine(gm, {"fr": 0.7, "it": 0.3}, "mix")`.

    It is a `LoRA`, and acts when `active` names it.

    Args:
        model: a result of `rewrite`, `adapt` or `load`.
        weights: the coefficient of each adapter, by name.
        name: of the new adapter.
        method: how the changes are summed, see `Method`.
        r: the rank of the sum. None for the smallest one that is exact, which `linear` has.
        density: the part of the entries that methods other than `linear` keep.
        seed: of the random part that `dare` keeps.

    Returns:
        For each site, the norm of what the sum lacks of the exact one, in norms of that: 0 without `r`.

    Raises:
        ConfigError: an adapter does not exist, the name is taken, or an argument is impossible.
        AdapterError: an adapter changes a site in a way that is not a change of its weight alone.
    """
    check_free([check_name(name)], adapter_names(model) if isinstance(model, nn.Module) else [])
    _check_method(method, r, density)
    refuse_sharded(model, "combine cannot change a model", "combine the adapters before fully_shard")
    graph = graph_with_adapters(model)
    coefficient = {each: _finite(weights[each]) for each in known_names(model, list(weights))}
    summed: dict[str, Factors] = {}
    for site, by_name in _by_site(graph, coefficient):
        terms = [(coefficient[each], placed) for each, placed in by_name.items()]
        if method == "linear":
            summed[site.name] = linear_sum(graph, site, terms, r)
        else:
            summed[site.name] = truncated(_merged(graph, site, terms, method, density, seed), r)
    insert_from(model, _as_lora(graph, summed), name)
    return {site: factors.error for site, factors in summed.items()}


@outside_inference_mode()
@torch.no_grad()
def to_lora(
    model: nn.Module, r: int | None = None, *, adapter: str | None = None
) -> tuple[fx.GraphModule, dict[str, float]]:
    """Return a graph whose one adapter is a plain `LoRA` that computes what the adapters of `model` do.

    It is what vLLM, llama.cpp and everything else reads that knows LoRA only: `save_peft(to_lora(gm)[0], path)`.

    Args:
        model: a result of `rewrite`, `adapt` or `load`; it is not changed.
        r: the rank at every site. None for the smallest one that is exact: exact to the bit for variants that are two
            factors, and to rounding for all others, for which it may be the smaller side of the weight.
        adapter: the name of the adapter to convert; None for all that act, by their coefficients.

    Returns:
        The graph; and for each site the norm of what it lacks of the change of the weight, in norms of that.

    Raises:
        ConfigError: there is no adapter of the name, or `r` is not a positive integer.
        AdapterError: `model` has no adapters, or was made by `wrap` or `backend`; or an adapter changes a site in a way
            that is not a change of its weight alone.
    """
    graph = graph_with_adapters(model)
    if r is not None:
        _check_rank(r)
    found = {site.name: factors for site, factors in changes(graph, acting(model, adapter), r)}
    return _as_lora(graph, found), {site: factors.error for site, factors in found.items()}


def change_of(source: nn.Module) -> dict[str, Factors]:
    """Return the change of each weight by the adapters of a model that act.

    Raises:
        AdapterError: as `to_lora`.
    """
    found = changes(graph_with_adapters(source), acting(source))
    return {site.name: factors for site, factors in found}


def acting(model: nn.Module, adapter: str | None = None) -> Mapping[str, float]:
    """Return the coefficients of the adapters that act, by name; of the adapter of one name, that it acts alone."""
    if adapter is not None:
        return dict.fromkeys(known_names(model, adapter), 1.0)
    found = coefficients(model, "A change of the weights")
    assert found is not None  # the graph is one of this library's, which follows switches
    return found


def changes(
    graph: fx.GraphModule, factors: Mapping[str, float], r: int | None = None
) -> Iterator[tuple[Site, Factors]]:
    """Yield each adapted site with the change of its weight by these adapters, each with its coefficient."""
    for site, by_name in _by_site(graph, factors):
        yield site, linear_sum(graph, site, _in_turn(by_name, factors), r)


def _in_turn(
    by_name: Mapping[str, Sequence[Placement]], acting: Mapping[str, float]
) -> list[tuple[float, Sequence[Placement]]]:
    """Return adapters that act around one another as one term, because what the outer one does may depend on the inner.

    Adapters whose changes are factors simply add up.
    """
    placed = [
        replace(placement, scale=placement.scale * acting[name]) for name, at in by_name.items() for placement in at
    ]
    return [(1.0, sorted(placed, key=lambda placement: placement.adapter))]


def graph_with_adapters(model: Any) -> AdaptedGraphModule:
    """Return the graph of an adapted model that has one.

    Raises:
        AdapterError: it has no adapters, or no graph.
    """
    adapter_tensors(model)  # refuses a model without adapters
    graph = graph_of(model)
    if isinstance(graph, AdaptedGraphModule):
        return graph
    raise AdapterError(
        f"{shown(model)} has no graph of this library's, which sums of adapters need. The way out: rewrite or adapt in"
        " place of wrap and backend, or optimize(model) for a graph from a file."
    )


def _by_site(graph: fx.GraphModule, names: Mapping[str, float]) -> list[tuple[Site, dict[str, list[Placement]]]]:
    """Return the adapters of these names at each of their sites, by name and the innermost first."""
    at_site: dict[str, dict[str, list[Placement]]] = defaultdict(lambda: defaultdict(list))
    for placement in placements(graph):
        if names.get(placement.adapter_name):
            refuse_banks([placement], A_SUM)
            at_site[placement.site][placement.adapter_name].append(placement)
    adapted = account_for(graph).adapted("a sum of adapters")
    return [(site, at_site[site.name]) for site in adapted if site.name in at_site]


# The change of one weight by the other methods.


def _merged(
    graph: fx.GraphModule,
    site: Site,
    terms: Sequence[tuple[float, Sequence[Placement]]],
    method: str,
    density: float,
    seed: int,
) -> Tensor:
    """Return the sum of the changes of a weight by a method other than `linear`, each with its coefficient."""
    changes = [change_at(graph, site, placed) for _, placed in terms]
    if method == "ties":
        pruned = torch.stack([change * (change.abs() >= _smallest_kept(change, density)) for change in changes])
    else:
        generator = torch.Generator().manual_seed(seed)
        pruned = torch.stack([change * _drawn(change, density, generator) / density for change in changes])
    weighted = pruned * pruned.new_tensor([coefficient for coefficient, _ in terms])[:, None, None]
    if method == "dare":
        return weighted.sum(0)
    # The sign that the sum has, and the mean of what is of that sign, as in PEFT.
    agrees = pruned.sign() == torch.where(pruned.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _smallest_kept(change: Tensor, density: float) -> Tensor:
    kept = max(int(density * change.numel()), 1)
    return change.abs().flatten().topk(kept).values[-1]


def _drawn(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return drawn.to(change.device)


# The adapter that has the changes.


def _as_lora(graph: fx.GraphModule, found: Mapping[str, Factors]) -> fx.GraphModule:
    """Return a copy of a graph whose one adapter is a `LoRA` with these factors."""
    if not found:
        raise AdapterError("No adapter acts, so that there is none to convert. The way out: active(model, names).")
    base = without_adapters(graph)
    sites = {site.name: site for site in account_for(base).sites if site.name in found}
    ranks = {name: factors.rank for name, factors in found.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
    plain = LoRA(
        r=r,
        alpha=float(r),
        rank_pattern=others,
        alpha_pattern={pattern: float(rank) for pattern, rank in others.items()},
        target_names=tuple(f"^{re.escape(name)}$" for name in found),
        target_kinds=tuple(dict.fromkeys(site.kind.name for site in sites.values())),
    )
    for name, site in sites.items():
        specs = plain.for_site(name).tensor_specs(site)
        if (specs["lora_A"].shape, specs["lora_B"].shape) != (found[name].a.shape, found[name].b.shape):
            raise AdapterError(f"{name!r} has no LoRA of this form, because it is of the kind {site.kind.name!r}.")
        plain.for_site(name).check(site)
    insert_adapters(base, [NewAdapter(plain, tuple(sites.values()))])
    for placement in placements(base):
        factors = found[placement.site]
        for own, value in (("lora_A", factors.a), ("lora_B", factors.b)):
            tensor_of(base, placement.tensors[own]).copy_(value)
    return base


# Arguments.


def _check_method(method: object, r: int | None, density: float) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"There is no method {method!r}; the methods are {', '.join(get_args(Method))}.")
    if r is not None:
        _check_rank(r)
    elif method != "linear":
        raise ConfigError(f"The sum by {method} is of full rank, and takes the rank to keep: r=16.")
    if not 0 < density <= 1:
        raise ConfigError(f"density is the part of the entries to keep, above 0 and at most 1, not {density}.")


def _check_rank(r: object) -> None:
    if type(r) is not int or r < 1:
        raise ConfigError(f"r must be a positive integer, not {r!r}.")


def _finite(factor: Any) -> float:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not torch.tensor(float(factor)).isfinite():
        raise ConfigError(f"The coefficient of an adapter is a finite number, not {factor!r}.")
    return float(factor)
