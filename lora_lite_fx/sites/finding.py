"""Find the sites of a graph: match products with frozen weights, infer their roles, and name them.

`DIALECTS` says which nodes are such products, `kinds/` what the products compute, and `roles.py` what they do in the
model. Adding a kind is its file in `kinds/` and its line in `DIALECTS`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..graph.calls_and_traces import collection_put_off
from ..graph.insertion import inner_name, is_inserted
from ..graph.tensors import tensor_of
from .computed import Computation, frozen_values, obstacle
from .dataflow import LinearNode, op_name
from .kinds.contraction import EINSUM
from .kinds.convolution import CONVOLUTION
from .kinds.embedding import EMBEDDING
from .kinds.experts import EXPERTS
from .kinds.linear import ADDMM, LINEAR, MATMUL, Linear
from .kinds.norm import NORM
from .kinds.site_kind import SiteKind
from .matching import Dialect, FrozenReader, Match
from .roles import infer_roles
from .site import Site

DIALECTS = (LINEAR, ADDMM, MATMUL, EINSUM, EMBEDDING, CONVOLUTION, EXPERTS, NORM)
"""All dialects. Of those that share an operator, the first that matches counts."""

KINDS = tuple(dict.fromkeys(kind.name for dialect in DIALECTS for kind in dialect.kinds))
"""The kinds of sites, as `Variant.target_kinds` names them."""

_BY_OPERATOR: dict[object, list[Dialect]] = defaultdict(list)
for _dialect in DIALECTS:
    for _operator in _dialect.operators:
        _BY_OPERATOR[_operator].append(_dialect)

# The calls of a site have in common the name of their module, the name of the weight, the kind, and the tensors.
_Group = tuple[str, str, SiteKind, Hashable]


@collection_put_off()
def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Return the sites of a graph in order of first execution, adapted or not. Adapters' own linears are not sites."""
    constants = _constants(gm.graph)
    reader = FrozenReader(gm, frozen_values(gm.graph))
    matches = [match for node in gm.graph.nodes if (match := match_site(reader, node)) is not None]
    # A weight that only multiplies constants is not a site. One that multiplies data at least once is a site with all
    # its calls.
    with_data = {(match.weight.identity, match.kind) for match in matches if match.call.x not in constants}
    matches = [match for match in matches if (match.weight.identity, match.kind) in with_data]
    linears = {id(match): LinearNode(match.call.x, match.call.y) for match in matches if match.kind.has_roles}
    infer_roles(gm.graph, [linear for linear in linears.values() if linear.x not in constants])

    groups: dict[_Group, list[Match]] = defaultdict(list)
    for match in matches:
        tensors = tuple(source.identity for source in (match.weight, match.bias) if source is not None)
        groups[_name(match), match.weight.name, match.kind, tensors].append(match)
    sites = []
    for ((_, weight, kind, _), members), name in zip(groups.items(), _names(groups), strict=True):
        if kind.token_dim == 1 and _is_same(gm, f"{name}.weight", weight):
            weight = f"{name}.weight"  # the graph may read it by the name of a head that is tied to it
        roles = (linears[id(match)].reasons for match in members if id(match) in linears)
        reasons = {role: reason for of_call in roles for role, reason in of_call.items()}
        *experts, d_out, d_in = kind.matrix(torch.empty(tuple(members[0].weight.shape), device="meta")).shape
        sites.append(
            Site(
                name,
                d_in,
                d_out,
                frozenset(reasons),
                weight,
                members[0].bias.name if members[0].bias else None,
                kind,
                members[0].bias.rows if members[0].bias else None,
                experts[0] if experts else 0,
                reasons=reasons,
                calls=tuple(match.call for match in members),
            )
        )
    return _with_ties(gm, sites)


def match_site(reader: FrozenReader, node: fx.Node) -> Match | None:
    """Return the match of `node` as a product with a frozen weight of real numbers, or None if it is not one."""
    if node.op != "call_function" or is_inserted(node):
        return None
    dialects = _BY_OPERATOR.get(node.target) or _BY_OPERATOR.get(op_name(node)) or ()
    match = next((match for dialect in dialects if (match := dialect.match(reader, node)) is not None), None)
    if match is None or is_complex(reader.gm, node, match.weight.name, match.weight.computed):
        return None
    return match


def is_complex(gm: fx.GraphModule, product: fx.Node, weight: str, computed: fx.Node | None) -> bool:
    """Return whether a product is one of complex numbers, for which adapters are not made.

    Args:
        gm: the graph module.
        product: the node.
        weight: the name of the parameter that it multiplies with, the largest if it multiplies with a computed tensor.
        computed: that tensor, or None. It is not looked at if computing it changes something, as spectral norm does.
    """
    value = product.meta.get("val")
    if "val" not in product.meta and computed is not None:  # symbolic tracing does not tell
        value = None if obstacle(gm, computed, product) else Computation.of(computed).run(gm)
    return tensor_of(gm, weight).is_complex() or (isinstance(value, Tensor) and value.is_complex())


def _with_ties(gm: fx.GraphModule, sites: list[Site]) -> list[Site]:
    """Return the sites with the names of those that share a parameter."""
    by_weight: dict[int, list[str]] = defaultdict(list)
    for site in sites:
        if site.computed_weight is None:
            by_weight[id(tensor_of(gm, site.weight))].append(site.name)
    ties = {name: tuple(other for other in names if other != name) for names in by_weight.values() for name in names}
    return [replace(site, tied=tied) if (tied := ties.get(site.name)) else site for site in sites]


def _names(groups: Mapping[_Group, list[Match]]) -> list[str]:
    """Return a qualified name for each site, of which `groups` has the calls. All are different."""
    among = Counter((name, kind.has_roles) for name, _, kind, _ in groups)
    names = {}
    for key in groups:
        name, weight, kind, _ = key
        if name in ("", weight) or among[name, kind.has_roles] > 1:  # no module of its own, or one of several
            names[key] = _name_in_module(weight, kind)
        elif not kind.has_roles and among[name, True]:  # an embedding whose weight is a head too
            names[key] = f"{name}.sites.{kind.name}"
        else:
            names[key] = name
    by_name: dict[str, list[_Group]] = defaultdict(list)
    for key, name in names.items():
        by_name[name].append(key)
    for name, alike in by_name.items():
        # One weight is read in both orientations, in several forms, or with several biases. The module that owns it
        # keeps the name.
        own = min(alike, key=lambda key: (_runs_elsewhere(groups[key]), key[2].transposed))
        stem = name if ".sites." in f".{name}" else f"{name}.sites"
        for key in alike:
            if key != own:
                turned = [f"{stem}.transposed"] if key[2].transposed != own[2].transposed else []
                numbered = [f"{stem}.use_{number}" for number in range(2, len(groups) + 2)]
                names[key] = next(new for new in (*turned, *numbered) if new not in names.values())
    return list(names.values())


def _runs_elsewhere(calls: list[Match]) -> bool:
    """Return whether a call runs outside the module that owns its weight."""
    return any(inner_name(match.call.node) != match.weight.name.rpartition(".")[0] for match in calls)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on no input of the graph."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and node.op == "call_function" and constants.issuperset(inputs)):
            constants.add(node)
    return constants


def _name(match: Match) -> str:
    """Return the qualified name for a match.

    The module stack names the module that ran, and the weight's path names the module that owns the weight. They differ
    for a tied weight, where the stack is right, and for a module that uses a child's weight functionally, where the
    owner is right.
    """
    owner, _, leaf = _as_attribute(match.weight.name).rpartition(".")
    stack = inner_name(match.call.node)
    if match.kind.is_named_after(leaf):
        return match.weight.name
    if stack is None or owner == stack or owner.startswith(f"{stack}." if stack else ""):
        return owner if leaf == "weight" or not leaf.endswith("weight") else f"{owner}.{leaf[: -len('_weight')]}"
    return stack


def name_of_weight(parameter: str) -> str:
    """Return the name of the site that a parameter would be the weight of, if it were the only one in its module."""
    owner, _, leaf = _as_attribute(parameter).rpartition(".")
    return owner if leaf == "weight" and owner else _name_in_module(parameter, Linear()) if owner else parameter


def _as_attribute(parameter: str) -> str:
    """Return the name of the tensor that a parametrization computes from a parameter; of other parameters their own."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.[\w.]+$", r"\1\2", parameter)


def _is_same(gm: fx.GraphModule, name: str, other: str) -> bool:
    """Return whether one parameter has both names."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    return name in parameters and parameters[name] is parameters[other]


def _name_in_module(weight: str, kind: SiteKind) -> str:
    """Return the qualified name of a site that is one of several in its module."""
    weight = _as_attribute(weight)
    stem = weight.removesuffix("_weight").removesuffix(".weight")
    owner, _, leaf = stem.rpartition(".")
    if stem == weight:  # the parameter has this name, so no module can have it
        stem = f"{owner}.sites.{leaf}".lstrip(".")
    return stem if kind.rows is None else f"{stem}.rows_{kind.rows[0]}_{kind.rows[1]}"
