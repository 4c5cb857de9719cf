"""Insert adapters into a graph of Dynamo's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from ..adapters.variant import Variant
from ..errors import AdapterError
from ..graph.provenance import is_inserted
from ..passes import InsertAdapter, Pipeline
from .carrier import MarkedSite
from .dynamo_graph import set_flag

# What both share.


def insert_marked(gm: fx.GraphModule, carried: Sequence[MarkedSite]) -> None:
    """Insert the adapters at their sites, with the tensors that they have."""
    roles = {one.site: one.roles for one in carried}
    tensors: dict[str, Tensor] = {}
    for one in carried:
        for path, tensor in one.tensors.items():
            if tensors.setdefault(path, tensor) is not tensor:
                raise AdapterError(f"Two models have adapters that share a tensor {path!r}, and run in one graph.")
    passes: dict[int, list[tuple[Variant, list[str]]]] = {}
    for one in carried:
        for placement in one.placements:
            group = passes.setdefault(placement.adapter, [])
            names = next((names for variant, names in group if variant == placement.variant), None)
            if names is None:
                group.append((placement.variant, names := []))
            names.append(one.site)
    Pipeline(
        tuple(
            InsertAdapter(variant, adapter, tuple(names), roles, tensors)
            for adapter, group in sorted(passes.items())
            for variant, names in group
        )
    ).run(gm)


def mode_flags(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes by which inserted adapters read whether the model is in training mode."""
    return [node for node in gm.graph.find_nodes(op="get_attr", target="training") if is_inserted(node)]


def with_mode_flags(gm: fx.GraphModule, training: bool) -> fx.GraphModule:
    """A copy of `gm` for one mode."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    one = fx.GraphModule(gm, graph)
    for node in mode_flags(one):
        set_flag(one, node, training)
    one.recompile()
    return one
