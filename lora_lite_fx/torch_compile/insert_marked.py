"""Insert adapters into a graph that Dynamo captured, for the modes that their modules are in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx

from ..adapters.placement import Placement
from ..adapters.variant import Variant
from ..errors import AdapterError
from ..graph.modes import is_flag
from ..graph.provenance import Provenance, is_inserted, recorded
from ..log import phase
from ..passes import InsertAdapter, Pipeline


@dataclass(frozen=True)
class MarkedSite:
    """A site of a graph, and the adapters that the graph is to have there.

    Args:
        name: the site's name in the graph.
        roles: its roles in the whole model, of which the graph may show a part only.
        placements: the adapters, the innermost first.
        tensors: the adapters' tensors by qualified name.
    """

    name: str
    roles: frozenset[str]
    placements: tuple[Placement, ...]
    tensors: dict[str, Tensor]


def insert_marked(gm: fx.GraphModule, sites: Sequence[MarkedSite]) -> None:
    """Insert the adapters at their sites, in place; `gm` reads the tensors that the sites have.

    Raises:
        AdapterError: two sites have different tensors of one name.
    """
    roles = {site.name: site.roles for site in sites}
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
    with phase("inserted the adapters into a graph") as details:
        Pipeline(tuple(inserted)).run(gm)
        details.append(f"{len(sites)} site{'s' * (len(sites) != 1)}")


def set_mode(gm: fx.GraphModule, is_training: Callable[[str], bool]) -> None:
    """Make the mode that the adapters of each site read a constant, in place."""
    for node in _mode_flags(gm):
        _replace(node, is_training(cast(Provenance, recorded(node)).site))


def _replace(node: fx.Node, constant: bool) -> None:
    """Put the constant in the place of `node`, and erase that."""
    for user in list(node.users):
        user.args = fx.node.map_aggregate(user.args, lambda arg: constant if arg is node else arg)
        user.kwargs = fx.node.map_aggregate(user.kwargs, lambda arg: constant if arg is node else arg)
    node.graph.erase_node(node)


def _mode_flags(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes by which inserted adapters read whether the module of their site is in training mode."""
    return [node for node in gm.graph.find_nodes(op="get_attr") if is_flag(node) and is_inserted(node)]
