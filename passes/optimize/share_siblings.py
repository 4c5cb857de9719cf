"""Let adapters that read one input share one product."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.insertion import is_inserted, record, recorded
from ...graph.layers import calls_in
from ...graph.parameter_work import first_input, move_to_front, parameter_work
from ...graph.queries import (
    is_deterministic,
    is_narrow,
    is_product,
    obstacle_between,
    source_of,
    value_of,
)
from ...graph.walk import ancestors
from ..pipeline import Declined, GraphPass, Outcome

aten = torch.ops.aten


@dataclass(frozen=True)
class ShareSiblings(GraphPass):
    """Make one product of those that adapters of one layer form with one input: `x A_q^T`, `x A_k^T`, `x A_v^T`.

    The one product is formed with the `A`s stacked one below the other, and split. Safe because each output of a
    product depends on one row of the matrix alone, and the matrices depend on no input of the graph, so that they can
    stand before the first product. Nothing is shared across a write in place, or a change of the mode of autograd or
    autocast, nor between modules on which hooks stand. An adapter that forms several products with its input, as PiSSA
    does, keeps them: its start is exact only while they are rounded alike.

    Before that, equal computations of adapters become one, such as casts of one input and slices of one tensor. Those
    that draw random numbers stay apart, because dropout must drop other elements for each adapter.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = _share_equal(gm)
        work = parameter_work(gm)
        known = set(work)
        call_of = calls_in(gm)
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if is_product(node) and node not in known:
                x, matrix = node.all_input_nodes[0], node.all_input_nodes[-1]
                value = value_of(gm, matrix)
                if value is not None and (matrix in known or matrix.op == "get_attr"):
                    groups[x, call_of(node), value.dtype].append(node)
        declined = _without_siblings(groups, known)
        sharing = _Sharing(gm, work, self.name)
        for (x, *_), products in groups.items():
            group, several = _one_of_each_adapter(products)
            if several:
                declined.append(Declined.at(several, "one adapter's products must be rounded alike"))
            if len(group) < 2:
                continue
            if why := obstacle_between(gm, group[0], group[-1]):
                declined.append(Declined.at(group, why))
                continue
            sharing.share(x, group)
            edits += 1
        return Outcome(edits, tuple(declined))


def _without_siblings(groups: dict[Any, list[fx.Node]], work: set[fx.Node]) -> list[Declined]:
    """Return why the products that are alone in their groups, of one input, layer and type, have no siblings there."""
    by_layer: dict[str | None, dict[fx.Node, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    for (_, layer, _), products in groups.items():
        source = source_of(products[0], work)
        if not is_narrow(source):  # else it is the second product of a branch, which no adapter shares
            by_layer[layer][source] += products
    alone = {products[0] for products in groups.values() if len(products) == 1}
    declined = []
    for by_source in by_layer.values():
        others = []
        for products in by_source.values():
            left_over = [node for node in products if node in alone]
            if len(products) == 1:
                others += left_over
            elif left_over:
                declined.append(Declined.at(left_over, _how_inputs_differ(products)))
        if others:
            why = "different inputs" if len(others) > 1 else "no other adapter of the layer reads this input"
            declined.append(Declined.at(others, why))
    return declined


def _how_inputs_differ(products: list[fx.Node]) -> str:
    """Return what tells products of one source apart."""
    if len({node.all_input_nodes[0] for node in products}) == 1:
        return "the matrices have different types"
    return "different inputs: dropout or casts come before the products"


def _one_of_each_adapter(products: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split products of one input into those that are their adapter's only one, and the others.

    The others may be meant to cancel to the last bit, as at the start of PiSSA. They would not, because parts of one
    product are not rounded alike.
    """
    call_of = {node: provenance.call for node in products if (provenance := recorded(node)) is not None}
    counts = Counter(call_of.values())
    single = [node for node, call in call_of.items() if counts[call] == 1]
    return single, [node for node, call in call_of.items() if counts[call] > 1]


@dataclass
class _Sharing:
    """Replaces products of one input by one product.

    Args:
        gm: the graph.
        work: its parameter work.
        by: the name of the pass.
        stacks: the stacked matrices, one for each list of matrices, also where a module runs twice.
        values: those of products without data, which the layers of a deep model have in common.
    """

    gm: fx.GraphModule
    work: list[fx.Node]
    by: str
    stacks: dict[tuple[fx.Node, ...], fx.Node] = field(default_factory=dict)
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def share(self, x: fx.Node, group: list[fx.Node]) -> None:
        """Replace the products `group` of `x` by one."""
        graph = self.gm.graph
        matrices = tuple(node.all_input_nodes[-1] for node in group)
        values = [value for matrix in matrices if (value := value_of(self.gm, matrix)) is not None]
        sizes = [value.shape[0] for value in values]
        if (stacked := self.stacks.get(matrices)) is None:
            size = sum(sizes), values[0].shape[1]
            matrix = torch.empty(size, dtype=values[0].dtype, device="meta")
            stacked = self.stacks[matrices] = self._stacked(matrices, like=group[0], val=matrix)
        products = [node.meta.get("val") for node in group]
        with graph.inserting_before(group[0]):
            val = self._value(products[0], sum(sizes))
            product = self._add(aten.linear.default, x, stacked, like=group[0], name="shared", val=val)
            parts = self._add(
                aten.split_with_sizes.default, product, sizes, -1, like=group[0], name="shared_parts", val=products
            )
            shares = [
                self._add(operator.getitem, parts, index, like=node, name="part", val=products[index])
                for index, node in enumerate(group)
            ]
        for node, share in zip(group, shares, strict=True):
            node.replace_all_uses_with(share)

    def _stacked(self, matrices: tuple[fx.Node, ...], like: fx.Node, val: Tensor) -> fx.Node:
        """Return a new node that stacks `matrices`, before the inputs of the graph."""
        graph = self.gm.graph
        needed = set(ancestors(matrices))
        move_to_front(graph, [node for node in self.work if node in needed])
        with graph.inserting_before(first_input(graph)):
            stacked = self._add(aten.cat.default, [*matrices], like=like, name="shared_matrix", val=val)
        stacked.meta.pop("nn_module_stack", None)  # as that of all parameter work
        return stacked

    def _value(self, like: Tensor | None, width: int) -> Tensor | None:
        """Return a tensor without data that is like this value of a product but for its width."""
        if like is None:
            return None
        key = id(like), width  # the values of the graph live as long as its nodes
        if key not in self.values:
            self.values[key] = like.new_empty(*like.shape[:-1], width)
        return self.values[key]

    def _add(self, target: Any, *args: Any, like: fx.Node, name: str, val: Any) -> fx.Node:
        node = self.gm.graph.create_node("call_function", target, args, name=f"{like.name}_{name}")
        node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
        if val is not None:
            node.meta["val"] = val
        provenance = recorded(like)
        assert provenance is not None
        record(node, replace(provenance, part="", config="", by=self.by))
        return node


def _share_equal(gm: fx.GraphModule) -> int:
    """Replace equal inserted nodes of one call by the first of them; equal parameter work, also of several calls."""
    work, call_of = set(parameter_work(gm)), calls_in(gm)
    first: dict[Any, fx.Node] = {}
    edits = 0
    for node in list(gm.graph.nodes):
        if not is_inserted(node) or not (node in work or is_deterministic(node)):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs), None if node in work else call_of(node))
        same = first.setdefault(key, node)
        if same is not node and (node in work or not obstacle_between(gm, same, node)):
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
            edits += 1
    return edits
