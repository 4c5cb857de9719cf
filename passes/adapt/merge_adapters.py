"""Fold adapters into frozen weights: `merge_sites` computes the new tensors, `MergeAdapters` puts them in a graph."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...adapters.accounting import account_for
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
from ...graph.provenance import is_size
from ...graph.tensors import tensor_of
from ...sites.computed import Computation, frozen_values
from ...sites.dialects import match_site
from ...sites.finding import find_sites
from ...sites.site import Site, frozen_tensor, stored_bias, stored_weight
from ..pipeline import GraphPass, eliminate_dead_code
from .remove_adapters import RemoveAdapters

aten = torch.ops.aten


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


@torch.no_grad()
def merge_sites(gm: fx.GraphModule, sites: Sequence[Site]) -> list[MergedSite]:
    """Fold the adapters of `gm` into weights and biases; neither the graph nor its tensors change.

    Outside dropout every variant is affine in `x`, so `b' = f(0)` and `W' = (f(I) - b')^T` hold all of it. Where the
    results go is for the caller to say: `MergeAdapters` puts them into the graph, `fold_into` into a model's modules.

    Args:
        gm: a graph with adapters.
        sites: its sites; those without adapters are left out of the result.

    Raises:
        AdapterError: the graph records an adapter at a site that is not found; or a merged value is not finite, or too
            large for the dtype of the base. The message names the site.
    """
    adapted = account_for(gm, sites).adapted("merge")
    by_site: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements(gm):
        by_site[placement.site].append(placement)
    return [_merge_site(gm, site, by_site[site.name]) for site in adapted]


def _merge_site(gm: fx.GraphModule, site: Site, around: list[Placement]) -> MergedSite:
    weight, bias = site_weight(gm, site), site_bias(gm, site)
    adapters = [(placement.local, placement.namespace(gm)) for placement in around]
    if not site.experts:
        return MergedSite(site, *_merge_matrix(site, weight, bias, adapters))
    merged = [
        _merge_matrix(site, matrix, None, [(variant, of_expert(p, expert)) for variant, p in adapters])
        for expert, matrix in enumerate(weight)
    ]
    has_bias = any(bias is not None for _, bias in merged)
    biases = [matrix.new_zeros(site.d_out) if bias is None else bias for matrix, bias in merged]
    return MergedSite(site, torch.stack([matrix for matrix, _ in merged]), torch.stack(biases) if has_bias else None)


def _merge_matrix(
    site: Site, weight: Tensor, bias: Tensor | None, adapters: list[tuple[Variant, Any]]
) -> tuple[Tensor, Tensor | None]:
    """Return `W'` and `b'` of one matrix `weight (d_out, d_in)` with the `adapters`, the innermost first."""
    # In float32 at least, so that folding into a half-precision weight rounds once.
    exact = torch.promote_types(weight.dtype, torch.float32)
    wide_weight = weight.to(exact)
    wide_bias = bias.to(exact) if bias is not None else None
    # A product with a matrix is the same with ordinary inputs, whatever the kind of site.
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
    merged = _rounded(site, "weight", rows.t().contiguous(), weight)
    return merged, _rounded(site, "bias", shift, weight if bias is None else bias) if needs_bias else None


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


@dataclass(frozen=True)
class MergeAdapters(GraphPass):
    """Give every adapted site the weight and bias that compute what its adapters do, and remove the adapters.

    Safe because every variant is affine in `x` outside dropout (`merge_sites`), and because the frozen tensors, which
    the user's model shares, are not written to. A merged site gets tensors of its own, and the other readers of a
    tied weight keep theirs. A site without a bias gets one if its adapters add one.
    """

    def run(self, gm: fx.GraphModule) -> int:
        sites = find_sites(gm)
        merged = merge_sites(gm, sites)
        RemoveAdapters().run(gm)  # the nodes of the sites themselves stay
        for merged_site in merged:
            _replace(gm, merged_site, sites)
        for merged_site in merged:
            _require_read(gm, merged_site)
        return len(merged)


def _require_read(gm: fx.GraphModule, merged: MergedSite) -> None:
    """Check that each call of a merged site reads the merged weight.

    Raises:
        AdapterError: a call does not, because the weight reaches it through nodes that other sites read too.
    """
    site = merged.site
    frozen = frozen_values(gm.graph)
    for call in site.calls:
        match = match_site(gm, call.node, frozen)
        weight = None if match is None else frozen_tensor(gm, match.weight, match.call.computed_weight)
        if weight is None or not _same(site.kind.matrix(weight), merged.weight):
            raise AdapterError(
                f"{site.name!r} cannot be merged: its call {call.node.name} reads the weight {site.weight!r} through"
                " nodes that something else reads too. The way out: keep its adapter, or leave the site out by"
                " exclude_names."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _replace(gm: fx.GraphModule, merged: MergedSite, sites: list[Site]) -> None:
    """Let the calls of a site read its merged tensors."""
    site = merged.site
    # Parts of one tensor are read through one node, so the sites of all parts read the new tensor.
    sharing = [s for s in sites if s is site or (site.kind.rows and s.weight == site.weight)]
    if site.computed_weight is not None:
        _set_computed(gm, site, "weight", merged.new_weight(stored_weight(gm, site)))
    else:
        _set(gm, site, sharing, site.weight, merged.new_weight(tensor_of(gm, site.weight)))
    bias = merged.new_bias(stored_bias(gm, site))
    if bias is None:
        return
    if site.bias is None:
        _add_bias(gm, site, bias)
    elif site.computed_bias is not None:
        _set_computed(gm, site, "bias", bias)
    else:
        sharing = [s for s in sites if s is site or (site.bias_rows and s.bias == site.bias)]
        _set(gm, site, sharing, site.bias, bias)


def _set_computed(gm: fx.GraphModule, site: Site, name: str, merged: nn.Parameter) -> None:
    """Let the calls of `site` read `merged` in place of the weight or bias `name` that the graph computes.

    It is computed as before if the adapters do not change it. Else what only this computation read leaves the module.
    """
    stored = stored_weight(gm, site) if name == "weight" else stored_bias(gm, site)
    if stored is None or torch.equal(stored, merged):
        return
    nodes = dict.fromkeys(call.computed_weight if name == "weight" else call.computed_bias for call in site.calls)
    path = _register(gm, site, name, merged)
    calls = {node for call in site.calls for node in (call.node, call.y)}
    for node in nodes:
        assert node is not None
        for user in [user for user in node.users if _leads_only_to(user, calls)]:
            with gm.graph.inserting_before(user):
                read = gm.graph.get_attr(path)
            read.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
            user.replace_input_with(node, read)
    tensors = [tensor for node in nodes if node is not None for tensor in Computation.of(node).tensors]
    eliminate_dead_code(gm)
    read_still = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    for tensor in dict.fromkeys(tensors):
        owner, _, leaf = tensor.rpartition(".")
        if not any(tensor == target or tensor.startswith(f"{target}.") for target in read_still):
            delattr(gm.get_submodule(owner), leaf)
    module = gm.get_submodule(site.name)
    if not hasattr(module, name):
        delattr(module, f"merged_{name}")
        module.register_parameter(name, merged)
        for read in gm.graph.find_nodes(op="get_attr"):
            read.target = f"{site.name}.{name}" if read.target == path else read.target


def _add_bias(gm: fx.GraphModule, site: Site, bias: nn.Parameter) -> None:
    """Add a bias at the calls of `site`, which has none."""
    if site.experts:
        raise AdapterError(
            f"{site.name!r} is a stack of experts without biases, but its adapters add biases: it cannot be merged."
        )
    bias = nn.Parameter(site.kind.bias(bias), requires_grad=False)
    path = _register(gm, site, "bias", bias)
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


def _register(gm: fx.GraphModule, site: Site, name: str, parameter: nn.Parameter) -> str:
    """Register a parameter that `site` alone reads, and return its qualified name."""
    if site.name not in dict(gm.named_modules()):
        gm.add_submodule(site.name, nn.Module())
    gm.get_submodule(site.name).register_parameter(f"merged_{name}", parameter)
    return f"{site.name}.merged_{name}"


def _set(gm: fx.GraphModule, site: Site, sharing: list[Site], name: str, merged: nn.Parameter) -> None:
    """Let the calls of the sites `sharing` read `merged`, a tensor of `site`, and not the parameter called `name`.

    If nothing else reads that parameter, `merged` takes its names. If something else does (tied weights), `merged`
    gets a name of its own.
    """
    frozen = tensor_of(gm, name)
    calls = {node for shared_by in sharing for call in shared_by.calls for node in (call.node, call.y)}
    aliases = [alias for alias, parameter in gm.named_parameters(remove_duplicate=False) if parameter is frozen]
    readers = [node for node in gm.graph.nodes if node.op == "get_attr" and node.target in aliases]
    leaves = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    read_by_leaf = any(parameter is frozen for leaf in leaves for parameter in leaf.parameters())
    if not read_by_leaf and all(_leads_only_to(user, calls) for node in readers for user in node.users):
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            setattr(gm.get_submodule(path), attribute, merged)
        return
    path = _register(gm, site, name.rpartition(".")[2], merged)
    for node in readers:
        users_here = [user for user in node.users if _leads_only_to(user, calls)]
        if users_here:
            with gm.graph.inserting_after(node):
                read = gm.graph.get_attr(path)
                read.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
            for user in users_here:
                user.replace_input_with(node, read)


def _leads_only_to(node: fx.Node, ends: set[fx.Node]) -> bool:
    """Return whether `node` is one of `ends`, or a view or cast of a weight that only they read."""
    if node in ends:
        return True
    read = [operand for operand in node.all_input_nodes if not is_size(operand)]
    return len(read) == 1 and bool(node.users) and all(_leads_only_to(user, ends) for user in node.users)
