"""Put folded adapters into a graph; `folding.py` computes the new tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx, nn

from ...errors import AdapterError
from ...graph.insertion import leads_only_to
from ...graph.tensors import has_values, register_tensor, tensor_of
from ...sites.computed import Computation, frozen_values
from ...sites.finding import find_sites, match_site
from ...sites.matching import FrozenReader
from ...sites.site import Site, frozen_tensor, stored_bias, stored_weight
from ..pipeline import GraphPass, eliminate_dead_code
from .folding import MergedSite, merge_sites
from .remove_adapters import RemoveAdapters

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeAdapters(GraphPass):
    """Give every adapted site the weight and bias that compute what its adapters do, and remove the adapters.

    Safe because a variant that is not affine in `x` is refused (`merge_sites`), and because the frozen tensors, which
    the user's model shares, are not written to. A merged site gets tensors of its own, and the other readers of a tied
    weight keep theirs. A site without a bias gets one if its adapters add one.

    Args:
        coefficients: by name of an adapter, the number by which it acts; the others do not act. None for all, fully.
        store: by name of a site with a computed weight, a function that makes of `W'` the tensors to compute it from,
            by name in the module of the weight. Without one the site gets an ordinary weight.
    """

    coefficients: Mapping[str, float] | None = None
    store: Mapping[str, Callable[[Tensor], Mapping[str, Tensor]]] = field(default_factory=dict)

    def run(self, gm: fx.GraphModule) -> int:
        sites = find_sites(gm)
        merged = merge_sites(gm, sites, self.coefficients)
        RemoveAdapters().run(gm)  # the nodes of the sites themselves stay
        for merged_site in merged:
            _replace(gm, merged_site, sites, self.store.get(merged_site.site.name))
        for merged_site in merged:
            if merged_site.site.name not in self.store:
                _require_read(gm, merged_site)
        return len(merged)


def _require_read(gm: fx.GraphModule, merged: MergedSite) -> None:
    """Check that each call of a merged site reads the merged weight.

    Raises:
        AdapterError: a call does not, because the weight reaches it through nodes that other sites read too.
    """
    site = merged.site
    reader = FrozenReader(gm, frozen_values(gm.graph))
    for call in site.calls:
        match = match_site(reader, call.node)
        weight = None if match is None else frozen_tensor(gm, match.weight.name, match.call.computed_weight)
        if weight is None or not _same(site.kind.matrix(weight), merged.weight):
            raise AdapterError(
                f"{site.name!r} cannot be merged: its call {call.node.name} reads the weight {site.weight!r} through"
                " nodes that something else reads too. The way out: keep its adapter, or leave the site out by"
                " exclude_names."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return not has_values(one) or torch.equal(one.nan_to_num(), other.nan_to_num())


def _replace(
    gm: fx.GraphModule,
    merged: MergedSite,
    sites: list[Site],
    store: Callable[[Tensor], Mapping[str, Tensor]] | None,
) -> None:
    """Let the calls of a site read its merged tensors."""
    site = merged.site
    # Parts of one tensor are read through one node, so the sites of all parts read the new tensor.
    sharing = [s for s in sites if s is site or (site.kind.rows and s.weight == site.weight)]
    if store is not None:
        owner = site.weight.rpartition(".")[0]
        for name, tensor in store(merged.weight).items():
            register_tensor(gm, f"{owner}.{name}", tensor)
    elif site.computed_weight is not None:
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
        for user in [user for user in node.users if leads_only_to(user, calls)]:
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
        if call.node.target is aten.linear.default or site.kind.takes_bias:
            call.node.args = (*call.node.args[:2], added, *call.node.args[3:])
            continue
        with gm.graph.inserting_after(call.y):
            total = gm.graph.call_function(aten.add.Tensor, (call.y, added))
        total.meta = dict(call.y.meta)
        call.y.replace_all_uses_with(total, delete_user_cb=partial(operator.is_not, total))


def _register(gm: fx.GraphModule, site: Site, name: str, parameter: nn.Parameter) -> str:
    """Register a parameter that `site` alone reads, and return its qualified name."""
    path = f"{site.name}.merged_{name}"
    register_tensor(gm, path, parameter)
    return path


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
    if not read_by_leaf and all(leads_only_to(user, calls) for node in readers for user in node.users):
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            setattr(gm.get_submodule(path), attribute, merged)
        return
    path = _register(gm, site, name.rpartition(".")[2], merged)
    for node in readers:
        users_here = [user for user in node.users if leads_only_to(user, calls)]
        if users_here:
            with gm.graph.inserting_after(node):
                read = gm.graph.get_attr(path)
                read.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
            for user in users_here:
                user.replace_input_with(node, read)
