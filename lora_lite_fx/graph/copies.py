"""Copies of graphs that share the signature of the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import fx, nn

from ..compat.torch import SPECS, codegen_of, empty_like


class Draft(fx.GraphModule):
    """A graph module for passes to change. It cannot be called, because compiling its code takes much of the time."""

    def recompile(self) -> Any:
        """Do nothing."""


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph`: nodes of its own, and the same signature (how inputs and outputs are nested).

    `copy.deepcopy` copies the signature leaf by leaf, and torch warns of each, because it deprecates the class of the
    leaves. A signature never changes, so the copy can share it.
    """
    copied = empty_like(graph)
    result: Any = copied.graph_copy(graph, {}, return_output_node=True)
    if result is not None:
        value, output = result
        copied.output(value, output.type).meta = copy.copy(output.meta)
    copied.set_codegen(copy.copy(codegen_of(graph)))
    return copied


def head_of(graph: fx.Graph) -> fx.Graph:
    """Return a graph that has the inputs of `graph` and computes nothing: its function takes the same arguments."""
    head = empty_like(graph)
    for node in graph.find_nodes(op="placeholder"):
        head.node_copy(node)
    head.output(())
    head.set_codegen(copy.copy(codegen_of(graph)))
    return head


def specs_of(gm: fx.GraphModule) -> dict[str, Any]:
    """Return how inputs and results of `gm` are nested, by the names under which its code reads that."""
    return {name: spec for name in SPECS if (spec := vars(gm).get(name)) is not None}


def prepare_copy(model: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare `memo` for `copy.deepcopy(model, memo)`: it shares the signatures of all graphs in `model`.

    Most of what a module has are empty registries, as of hooks. Half of the time of a copy would go into these.
    """
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict, set) and not value:
                memo[id(value)] = type(value)()
        if isinstance(module, fx.GraphModule) and id(module.graph) not in memo:
            memo[id(module.graph)] = copy_graph(module.graph)
            memo.update({id(spec): spec for spec in specs_of(module).values()})
