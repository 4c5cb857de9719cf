"""Find the sites of a graph, and name them."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import fx

from ..graph.provenance import inner_name
from .dataflow import LinearNode
from .dialects import Match, match_site
from .kinds.experts import Experts
from .kinds.linear import SiteKind
from .roles import infer_roles
from .site import Site


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of a graph in order of first execution, adapted or not; adapters' own linears are no sites."""
    constants = _constants(gm.graph)
    matches = [match for node in gm.graph.nodes if (match := match_site(gm, node)) is not None]
    # What never sees data is no site; what does is adapted at its calls on constants too.
    seeing = {(match.weight, match.kind) for match in matches if match.call.x not in constants}
    found = [match for match in matches if (match.weight, match.kind) in seeing]
    linears = {id(match): LinearNode(match.call.x, match.call.y) for match in found if match.kind.name == "linear"}
    infer_roles(gm.graph, [linear for linear in linears.values() if linear.x not in constants])

    groups: dict[tuple[str, str, SiteKind], list[Match]] = defaultdict(list)
    for match in found:
        groups[_name(match), match.weight, match.kind].append(match)
    names = Counter((name, kind.name == "linear") for name, _, kind in groups)
    sites = []
    for (name, weight, kind), members in groups.items():
        if name == weight or names[name, kind.name == "linear"] > 1:
            name = _name_in_module(weight, kind)
        elif kind.name != "linear" and names[name, True]:  # an embedding whose weight is a head too
            name = f"{name}.sites.{kind.name}"
        if kind.name == "embedding" and _is_same(gm, f"{name}.weight", weight):
            weight = f"{name}.weight"  # the graph may read it by the name of a head that is tied to it
        roles = (linears[id(match)].reasons for match in members if id(match) in linears)
        reasons = {role: reason for each in roles for role, reason in each.items()}
        *experts, d_out, d_in = kind.matrix(gm.get_parameter(weight).detach()).shape
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
                reasons,
                tuple(match.call for match in members),
            )
        )
    return sites


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of the graph."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and node.op == "call_function" and constants.issuperset(inputs)):
            constants.add(node)
    return constants


def _name(match: Match) -> str:
    """The qualified name of a linear.

    The module stack names the module that ran, the weight's own path the module that owns it. They differ where
    a weight is tied (the stack is right) and where a module uses a child's weight functionally (the owner is).
    """
    owner, _, leaf = match.weight.rpartition(".")
    stack = inner_name(match.call.node)
    if isinstance(match.kind, Experts):
        return match.weight
    if stack is None or owner == stack or owner.startswith(f"{stack}." if stack else ""):
        return owner if leaf == "weight" or not leaf.endswith("weight") else f"{owner}.{leaf[: -len('_weight')]}"
    return stack


def _is_same(gm: fx.GraphModule, name: str, other: str) -> bool:
    """Whether a parameter has both names."""
    found = dict(gm.named_parameters(remove_duplicate=False))
    return name in found and found[name] is found[other]


def _name_in_module(weight: str, kind: SiteKind) -> str:
    """The qualified name of a site that is one of several in its module."""
    stem = weight.removesuffix("_weight").removesuffix(".weight")
    owner, _, leaf = stem.rpartition(".")
    if stem == weight:  # a module of the parameter's own name there cannot be
        stem = f"{owner}.sites.{leaf}".lstrip(".")
    return stem if kind.rows is None else f"{stem}.rows_{kind.rows[0]}_{kind.rows[1]}"
