"""Compile the graphs of models that carry their adapters: the marks in a graph say where which adapters are to be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn

from ..adapters.placement import Placement
from ..adapters.variant import Variant
from ..errors import AdapterError
from ..graph.insertion import Insertion, is_inserted, recorded
from ..graph.modes import is_flag
from ..graph.tensors import tensor_of
from ..log import phase
from ..passes import InsertAdapter, Pipeline
from ..sites.finding import find_sites
from .dynamo_graph import Compiled, Compiler, to_aten, to_inputs
from .marked_model import MARK, MARKED, not_a_linear, site_in_mark


class SiteInGraph(NamedTuple):
    """A marked site of a graph.

    Args:
        name: its name in the graph.
        roles: its roles in the whole model, of which the graph may show a part only.
        is_training: the mode of its module.
        placements: the adapters that act, the innermost first, by the site's name in the graph.
        tensors: theirs by qualified name.
    """

    name: str
    roles: frozenset[str]
    is_training: bool
    placements: list[Placement]
    tensors: dict[str, Tensor]


def has_marks(gm: fx.GraphModule) -> bool:
    """Return whether a module of `gm` carries adapters."""
    return bool(gm.graph.find_nodes(op="call_function", target=MARK))


def compile_marked(gm: fx.GraphModule, inputs: list[Any], inner: Compiler) -> Compiled:
    """Compile a graph with the adapters that its marks ask for.

    Args:
        gm: Dynamo's graph; it is not changed.
        inputs: Dynamo's example inputs.
        inner: compiles the rewritten graph.

    Raises:
        AdapterError: a mark is not at a linear, or the tensors of an adapter are not parameters.
    """
    aten = to_aten(gm, inputs)
    _insert(aten, _take_marks_out(aten, inputs))
    added, stand_ins = to_inputs(aten, inputs)
    compiled = inner(aten, [*inputs, *stand_ins])
    return lambda *inputs: compiled(*inputs, *added)


def _take_marks_out(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[SiteInGraph]:
    """Remove the marks of `gm`, name the sites behind them as the marks do, and return these sites."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    marked = [(site, call, mark) for site in find_sites(gm) for call in site.calls if (mark := _mark_behind(call.x))]
    sites: dict[tuple[str, str], SiteInGraph] = {}
    for site, call, mark in marked:
        key = (site_in_mark(str(mark.args[3])), site.weight)
        if key not in sites:
            # Several models with a site of that name may run in one graph.
            taken = sum(name == key[0] for name, _ in sites)
            sites[key] = _site_of(gm, mark, values, f"{key[0]}_{taken + 1}" if taken else key[0])
        call.node.meta["nn_module_stack"] = {"": (sites[key].name, nn.Module)}
    at_sites = {mark for _, _, mark in marked}
    for mark in gm.graph.find_nodes(op="call_function", target=MARK):
        if mark not in at_sites:
            raise not_a_linear(site_in_mark(mark.args[3]))
        mark.replace_all_uses_with(mark.args[0])
        gm.graph.erase_node(mark)
    return list(sites.values())


def _mark_behind(node: fx.Node) -> fx.Node | None:
    """Return the mark that `node` is, or is a cast or a view of; or None."""
    while node.target is not MARK:
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return node


def _site_of(gm: fx.GraphModule, mark: fx.Node, values: dict[fx.Node, Any], name: str) -> SiteInGraph:
    """Return the site that a mark describes, under the name that it has in the graph."""
    nodes, is_training, text, acting = cast(tuple[list[fx.Node], bool, str, str], mark.args[1:])
    described = MARKED[text]
    if any(node not in values and node.op != "get_attr" for node in nodes):
        raise AdapterError(
            f"A tensor of the adapter at site {site_in_mark(text)!r} is computed, as by a parametrization. The way out:"
            " rewrite or adapt, which compile too; or leave the parametrization out."
        )
    tensors = [values[node] if node in values else tensor_of(gm, str(node.target)) for node in nodes]
    chosen = described.acting(acting)
    each = iter(tensors)
    of_placements = [(placement, [next(each) for _ in placement.tensors]) for placement in described.placements]
    named = [(replace(placement, site=name), own) for placement, own in of_placements if placement in chosen]
    by_path = {path: tensor for p, own in named for path, tensor in zip(p.tensors.values(), own, strict=True)}
    return SiteInGraph(name, described.site.roles, is_training, [p for p, _ in named], by_path)


def _insert(gm: fx.GraphModule, sites: Sequence[SiteInGraph]) -> None:
    """Insert the adapters at their sites, in place, each for the mode that its module is in.

    Raises:
        AdapterError: two sites have different tensors of one name.
    """
    roles = {site.name: site.roles for site in sites}
    training = {site.name: site.is_training for site in sites}
    tensors: dict[str, Tensor] = {}
    for path, tensor in (item for site in sites for item in site.tensors.items()):
        if tensors.setdefault(path, tensor) is not tensor:
            raise AdapterError(f"Two models have adapters that share a tensor {path!r}, and run in one graph.")
    chosen: dict[tuple[int, str, Variant], list[str]] = defaultdict(list)
    for site in sites:
        for placement in site.placements:
            chosen[placement.adapter, placement.adapter_name, placement.variant].append(site.name)
    inserted = (
        InsertAdapter(variant, adapter, tuple(names), roles, tensors, adapter_name)
        for (adapter, adapter_name, variant), names in sorted(chosen.items(), key=lambda item: item[0][0])
    )
    with phase("inserted the adapters into a graph", "inserting the adapters into a graph") as details:
        Pipeline(tuple(inserted)).run(gm)
        details.append(f"{len(sites)} site{'s' * (len(sites) != 1)}")
    for flag in [node for node in gm.graph.find_nodes(op="get_attr") if is_flag(node) and is_inserted(node)]:
        constant = training[cast(Insertion, recorded(flag)).site]
        for user in list(flag.users):
            user.args = fx.node.map_aggregate(user.args, lambda arg: constant if arg is flag else arg)  # noqa: B023
            user.kwargs = fx.node.map_aggregate(user.kwargs, lambda arg: constant if arg is flag else arg)  # noqa: B023
        gm.graph.erase_node(flag)
