"""Open the regions that set the mode of autograd or autocast."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...compat.torch import (
    AUTOCAST_REGIONS_COMPILE,
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SET_GRAD_ENABLED,
    OpOverload,
    schema_of,
)
from ...graph.regions import AUTOCAST_REGION, GRAD_REGION
from ..pipeline import GraphPass

_SETTINGS: dict[Any, int] = {GRAD_REGION: 1, AUTOCAST_REGION: 4}
"""The number of arguments that set the mode of a region. Its body, a graph module, and the operands come after them."""


@dataclass(frozen=True)
class InlineRegions(GraphPass):
    """Put the nodes of `no_grad`, `enable_grad` and `autocast` regions into the graph itself.

    `torch.export` makes such a region an operator with a graph of its own, into which no other pass looks. Safe because
    the same nodes then run between a call that enters the mode and a call that goes back to the mode of the caller; a
    re-export makes regions of them again.

    Regions of autograd are opened all, because torch.compile takes none with dynamic sizes; so are those of autocast
    before torch 2.13. From there on a region of autocast stays if it reads no parameter, draws no random numbers and
    writes to nothing, because it contains nothing to adapt. One that writes would be taken for dead code if it returns
    nothing. The bodies of `cond`, `scan` and `while_loop` stay too, because they do not run exactly once. An exception
    inside an open region leaves its thread in the region's mode.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        while regions := [node for node in gm.graph.nodes if _is_to_open(gm, node)]:
            for node in regions:
                _inline(gm, node)
            edits += len(regions)
        return edits


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    reference: Any = node.args[_SETTINGS[node.target]]
    body = gm.get_submodule(reference.target)
    assert isinstance(body, fx.GraphModule)
    return body


def _is_to_open(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _SETTINGS:
        return False
    return node.target is GRAD_REGION or not AUTOCAST_REGIONS_COMPILE or _holds_work(gm, node)


def _holds_work(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Check whether a region reads parameters, draws random numbers, as dropout does, or writes in place."""
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    graphs = [module.graph for module in _body(gm, node).modules() if isinstance(module, fx.GraphModule)]
    if any(operand.op == "get_attr" and operand.target in parameters for operand in node.all_input_nodes):
        return True
    operators = [inner.target for graph in graphs for inner in graph.nodes if isinstance(inner.target, OpOverload)]
    return any(
        torch.Tag.nondeterministic_seeded in operator.tags or schema_of(operator).is_mutable for operator in operators
    )


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    graph, count = gm.graph, _SETTINGS[node.target]
    settings, body, operands = node.args[:count], _body(gm, node), node.args[count + 1 :]
    values: dict[fx.Node, fx.Node] = dict(
        zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)  # type: ignore[arg-type]
    )
    _take_attributes(gm, body)
    with graph.inserting_before(node):
        if node.target is GRAD_REGION:
            before = graph.call_function(torch.is_grad_enabled)
            graph.call_function(SET_GRAD_ENABLED, settings)
        else:
            before = graph.call_function(ENTER_AUTOCAST, settings)
        results = graph.graph_copy(body.graph, values)
        graph.call_function(SET_GRAD_ENABLED if node.target is GRAD_REGION else EXIT_AUTOCAST, (before,))
    if isinstance(results, (tuple, list)):
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)  # type: ignore[arg-type]
    graph.erase_node(node)


def _take_attributes(gm: fx.GraphModule, body: fx.GraphModule) -> None:
    """Register the constants and graphs that `body` reads in `gm`, under new names."""
    for node in body.graph.find_nodes(op="get_attr"):
        value = getattr(body, str(node.target))
        name = next(n for i in itertools.count() if not hasattr(gm, n := f"{node.target}_{i}"))
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            gm.register_buffer(name, value, persistent=False)
        else:
            setattr(gm, name, value)
        node.target = name
