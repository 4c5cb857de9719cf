"""Fold adapters into the frozen weights."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...adapters.adapted_site import compose
from ...adapters.frozen_linear import FrozenLinear
from ...adapters.placement import (
    Placement,
    placements,
    site_bias,
    site_weight,
)
from ...adapters.variant import Variant, of_expert
from ...errors import AdapterError
from ...graph.tensors import tensor_of
from ...sites.finding import find_sites
from ...sites.site import Site
from ..pipeline import GraphPass
from .remove_adapters import RemoveAdapters

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeAdapters(GraphPass):
    """Give every adapted site the weight and bias that compute what its adapters do, and remove the adapters.

    Safe because outside dropout every variant is affine in `x`: `b' = f(0)` and `W' = (f(I) - b')^T` hold all of it.
    The frozen tensors, which the user's model shares, are not written to; a merged site gets tensors of its own, and
    the other users of a tied weight keep theirs. A site without a bias gets one if its adapters add one.
    """

    def run(self, gm: fx.GraphModule) -> int:
        by_site: dict[str, list[Placement]] = defaultdict(list)
        for placement in placements(gm):
            by_site[placement.site].append(placement)
        sites = [site for site in find_sites(gm) if site.name in by_site]
        merged = {site.name: merged_tensors(gm, site, by_site[site.name]) for site in sites}
        RemoveAdapters().run(gm)
        sites = find_sites(gm)
        for site in sites:
            if site.name in merged:
                _replace(gm, site, sites, *merged[site.name])
        return len(merged)


@torch.no_grad()
def merged_tensors(gm: fx.GraphModule, site: Site, around: list[Placement]) -> tuple[Tensor, Tensor | None]:
    """`W' (d_out, d_in)` and `b' (d_out,)`, in the frozen dtype; no bias where it is zero and none was there.

    Of experts, `(experts, d_out, d_in)` and `(experts, d_out)`.
    """
    weight, bias = site_weight(gm, site), site_bias(gm, site)
    adapters = [(placement.local, placement.namespace(gm)) for placement in around]
    if not site.experts:
        return _effective_linear(site, weight, bias, adapters)
    each = [
        _effective_linear(site, one, None, [(variant, of_expert(p, expert)) for variant, p in adapters])
        for expert, one in enumerate(weight)
    ]
    return torch.stack([one for one, _ in each]), (
        torch.stack([torch.zeros_like(w[:, 0]) if shift is None else shift for w, shift in each])
        if any(shift is not None for _, shift in each)
        else None
    )


def _effective_linear(
    site: Site, weight: Tensor, bias: Tensor | None, adapters: list[tuple[Variant, Any]]
) -> tuple[Tensor, Tensor | None]:
    # In float32 at least, so that folding into a half-precision weight rounds once.
    exact = torch.promote_types(weight.dtype, torch.float32)
    wide_weight = weight.to(exact)
    wide_bias = bias.to(exact) if bias is not None else None
    # A product with a matrix is what it is with ordinary inputs, whatever the kind of site.
    base = FrozenLinear(
        lambda x: nn.functional.linear(x, wide_weight, wide_bias),
        wide_weight,
        wide_bias,
        site,
        training=False,
    )
    adapted = compose(base, adapters)
    with torch.autocast(weight.device.type, enabled=False):
        shift = adapted(torch.zeros(1, site.d_in, dtype=exact, device=weight.device)).squeeze(0)
        rows = adapted(site.kind.identity(site.d_in, exact, weight.device)) - shift
    needs_bias = bias is not None or bool(shift.any())
    return rows.t().contiguous().to(weight.dtype), shift.to(weight.dtype) if needs_bias else None


def _replace(gm: fx.GraphModule, site: Site, sites: list[Site], weight: Tensor, bias: Tensor | None) -> None:
    # Parts of one tensor are read through one node: what is given to one site is given to those of the other parts.
    sharing = [s for s in sites if s is site or (site.kind.rows and s.weight == site.weight)]
    _set(gm, site, sharing, site.weight, site.kind.stored(weight, tensor_of(gm, site.weight)))
    if bias is not None and site.bias is not None:
        sharing = [s for s in sites if s is site or (site.bias_rows and s.bias == site.bias)]
        _set(gm, site, sharing, site.bias, site.stored_bias(bias, tensor_of(gm, site.bias)))
    elif bias is not None:
        _add_bias(gm, site, bias)


def _add_bias(gm: fx.GraphModule, site: Site, bias: Tensor) -> None:
    """Give the calls of `site`, whose linear has no bias, one."""
    if site.experts:
        raise AdapterError(
            f"{site.name!r} is a stack of experts without biases, and its adapters add some: no merging."
        )
    path = _own_parameter(gm, site, "bias", bias)
    for call in site.calls:
        with gm.graph.inserting_before(call.node):
            added = gm.graph.get_attr(path)
        if call.node.target is aten.linear.default or site.kind.name == "conv":
            call.node.args = (*call.node.args[:2], added, *call.node.args[3:])
            continue
        with gm.graph.inserting_after(call.y):
            total = gm.graph.call_function(aten.add.Tensor, (call.y, added))
        total.meta = dict(call.y.meta)
        call.y.replace_all_uses_with(total, delete_user_cb=partial(operator.is_not, total))


def _own_parameter(gm: fx.GraphModule, site: Site, name: str, tensor: Tensor) -> str:
    """Register a frozen parameter that `site` alone reads; returns its qualified name."""
    if site.name not in dict(gm.named_modules()):
        gm.add_submodule(site.name, nn.Module())
    gm.get_submodule(site.name).register_parameter(f"merged_{name}", nn.Parameter(tensor, requires_grad=False))
    return f"{site.name}.merged_{name}"


def _set(gm: fx.GraphModule, site: Site, sharing: list[Site], name: str, tensor: Tensor) -> None:
    """Let the calls of `sharing` read `tensor`, a merged one of `site`, and not the parameter called `name`."""
    shared = tensor_of(gm, name)
    parameter = nn.Parameter(tensor, requires_grad=False)
    calls = {node for each in sharing for call in each.calls for node in (call.node, call.y)}
    aliases = [alias for alias, tensor in gm.named_parameters(remove_duplicate=False) if tensor is shared]
    readers = [node for node in gm.graph.nodes if node.op == "get_attr" and node.target in aliases]
    leaves = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    read_by_leaf = any(shared is parameter for leaf in leaves for parameter in leaf.parameters())
    if not read_by_leaf and all(_leads_only_to(user, calls) for node in readers for user in node.users):
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            setattr(gm.get_submodule(path), attribute, parameter)
        return
    # Tied: this site alone gets the new tensor, under a name of its own.
    path = _own_parameter(gm, site, name.rpartition(".")[2], tensor)
    for node in readers:
        mine = [user for user in node.users if _leads_only_to(user, calls)]
        if mine:
            with gm.graph.inserting_after(node):
                own = gm.graph.get_attr(path)
                own.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
            for user in mine:
                user.replace_input_with(node, own)


def _leads_only_to(node: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether `node` is one of `ends`, or a view or cast of a weight that only they read."""
    if node in ends:
        return True
    return (
        len(node.all_input_nodes) == 1 and bool(node.users) and all(_leads_only_to(user, ends) for user in node.users)
    )
