"""Let adapters that read one input share one product."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...graph.layers import layer_of
from ...graph.parameter_work import first_input, move_to_front, parameter_work
from ...graph.provenance import is_inserted, record, recorded
from ...graph.queries import (
    is_deterministic,
    is_product,
    must_not_move,
    value_of,
)
from ..pipeline import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class ShareSiblings(GraphPass):
    """Make one product of those that adapters of one layer form with one input: `x A_q^T`, `x A_k^T`, `x A_v^T`.

    It is formed with the `A`s one below the other, and split. Safe because each output of a product depends on one row
    of the matrix alone, and the matrices depend on no input, so that they can stand before the first product. Before
    that, equal computations of adapters (casts of one input, slices of one tensor) become one, if they draw no random
    numbers: what is dropped for one adapter is not for another. Nothing is shared where something is overwritten
    between the first use and the last, or the mode of autograd or autocast changes. An adapter that forms several
    products with its input, as PiSSA does, keeps them: its start is exact only while they are rounded alike.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = _share_equal(gm)
        work = parameter_work(gm)
        known = set(work)
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if is_product(node) and node not in known:
                x, matrix = node.all_input_nodes[0], node.all_input_nodes[-1]
                value = value_of(gm, matrix)
                if value is not None and (matrix in known or matrix.op == "get_attr"):
                    groups[x, layer_of(node), value.dtype].append(node)
        for (x, *_), found in groups.items():
            group = _one_of_each_adapter(found)
            if len(group) > 1 and not must_not_move(gm, group[0], group[-1]):
                _share(gm, x, group, work, self.name)
                edits += 1
        return edits


def _one_of_each_adapter(products: list[fx.Node]) -> list[fx.Node]:
    """Of products of one input those that are their adapter's only one.

    Several may be meant to cancel to the last bit, as the start of PiSSA does, and parts of one product are not rounded
    alike.
    """
    calls = Counter(by.call for node in products if (by := recorded(node)) is not None)
    return [node for node in products if (by := recorded(node)) is not None and calls[by.call] == 1]


def _share(gm: fx.GraphModule, x: fx.Node, group: list[fx.Node], work: list[fx.Node], by: str) -> None:
    """Replace the products `group` of `x` by one."""
    graph = gm.graph
    matrices = [node.all_input_nodes[-1] for node in group]
    needed = set(matrices)
    for node in reversed(work):
        if node in needed:
            needed.update(node.all_input_nodes)
    move_to_front(graph, [node for node in work if node in needed])
    values = [value for matrix in matrices if (value := value_of(gm, matrix)) is not None]
    sizes = [value.shape[0] for value in values]
    with graph.inserting_before(first_input(graph)):
        stacked = graph.call_function(aten.cat.default, (matrices,))
    stacked.meta["val"] = torch.empty(sum(sizes), values[0].shape[1], dtype=values[0].dtype, device="meta")
    with graph.inserting_before(group[0]):
        product = graph.call_function(aten.linear.default, (x, stacked))
        parts = graph.call_function(aten.split_with_sizes.default, (product, sizes, -1))
        shares = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(group))]
    provenance = recorded(group[0])
    assert provenance is not None
    for node in (stacked, product, parts, *shares):
        record(node, replace(provenance, part="", config="", by=by))
    for node in (product, parts, *shares):
        if "nn_module_stack" in group[0].meta:
            node.meta["nn_module_stack"] = group[0].meta["nn_module_stack"]
    for node, share in zip(group, shares, strict=True):
        node.replace_all_uses_with(share)


def _share_equal(gm: fx.GraphModule) -> int:
    """Let the first of equal inserted nodes do for all of a layer; for parameter work, for all."""
    work = set(parameter_work(gm))
    first: dict[Any, fx.Node] = {}
    edits = 0
    for node in list(gm.graph.nodes):
        if not is_inserted(node) or not (node in work or is_deterministic(node)):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs), None if node in work else layer_of(node))
        same = first.setdefault(key, node)
        if same is not node and (node in work or not must_not_move(gm, same, node)):
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
            edits += 1
    return edits
