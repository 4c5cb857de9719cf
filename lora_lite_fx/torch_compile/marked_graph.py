"""Compile the graphs of models that carry their adapters: the marks in a graph say everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from ..errors import AdapterError
from ..graph.tensors import tensor_of
from ..sites.finding import find_sites
from .dynamo_graph import Compiled, Compiler, to_aten, to_inputs
from .insert_marked import MarkedSite, insert_marked, set_mode
from .marked_model import MARK, not_a_linear, read_mark, site_in_mark


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
    sites, training = _take_marks_out(aten, inputs)
    insert_marked(aten, sites)
    set_mode(aten, training.__getitem__)
    added, stand_ins = to_inputs(aten, inputs)
    compiled = inner(aten, [*inputs, *stand_ins])
    return lambda *inputs: compiled(*inputs, *added)


def _take_marks_out(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[MarkedSite], dict[str, bool]]:
    """Remove the marks of `gm`, and name the sites behind them as the marks do.

    Returns:
        The sites, and for each name whether the site's module is in training mode.
    """
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    marked = [(site, call, mark) for site in find_sites(gm) for call in site.calls if (mark := _mark_behind(call.x))]
    sites: dict[tuple[str, str], MarkedSite] = {}
    training: dict[str, bool] = {}
    for site, call, mark in marked:
        nodes, is_training, text, acting = cast(tuple[list[fx.Node], bool, str, str], mark.args[1:])
        key = (site_in_mark(text), site.weight)
        if key not in sites:
            if any(node not in values and node.op != "get_attr" for node in nodes):
                raise AdapterError(
                    f"A tensor of the adapter at site {key[0]!r} is computed, as by a parametrization. The way out:"
                    " rewrite or adapt, which compile too; or leave the parametrization out."
                )
            tensors = [values[node] if node in values else tensor_of(gm, str(node.target)) for node in nodes]
            # Several models with a site of that name may run in one graph.
            taken = sum(name == key[0] for name, _ in sites)
            name = f"{key[0]}_{taken + 1}" if taken else key[0]
            sites[key] = read_mark(text, acting, tensors, name)
            training[name] = is_training
        call.node.meta["nn_module_stack"] = {"": (sites[key].name, nn.Module)}
    at_sites = {mark for _, _, mark in marked}
    for mark in gm.graph.find_nodes(op="call_function", target=MARK):
        if mark not in at_sites:
            raise not_a_linear(site_in_mark(mark.args[3]))
        mark.replace_all_uses_with(mark.args[0])
        gm.graph.erase_node(mark)
    return list(sites.values()), training


def _mark_behind(node: fx.Node) -> fx.Node | None:
    """Return the mark that `node` is, or is a cast or a view of; or None."""
    while node.target is not MARK:
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return node
