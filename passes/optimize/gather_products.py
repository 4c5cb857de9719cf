"""Gather the products of low-rank adapters that read one input, with those of their sites, into one operation."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.parameter_work import parameter_work
from ...graph.provenance import is_inserted
from ...graph.queries import (
    is_product,
    must_not_move,
    reads_tensor,
    value_of,
)
from ...graph.writes import may_return_a_view, overwrites
from ...ops.low_rank_products import Branch, LowRankProducts, flatten
from ..pipeline import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class GatherProducts(GraphPass):
    """Make one operation of `t = x A^T` and, where `y = x W^T + b` is only added to `alpha t B^T`, of these sums.

    A sum that is only scaled by a row of adapter values, as DoRA's, is scaled there too, unless it might be overwritten
    afterwards: the result is kept for the gradient of the scale, which is no more to keep where the base keeps it.

    Branches are then added into the outputs of the sites where they are, with no further pass over memory, and in the
    backward pass the gradients of `x` that come from q, k, v and their adapters into one tensor. Safe because it
    computes the same sums, an output of a site that nothing else reads is overwritten only, and nothing is moved across
    a write in place or a change of the mode of autograd or autocast. `LowRankProducts` falls back to the plain products
    where in-place addition would not do the same.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        rows = _rows(gm)
        for product in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            if is_product(product) and (sums := _sums(gm, product, rows)):
                _gather(gm.graph, product, sums)
                edits += 1
        return edits


class Sum(NamedTuple):
    """`scale add(y, linear(t, b), alpha)`, where t is these columns of a product, and y a linear of its input.

    `casts` bring other values to the type of y.
    """

    node: fx.Node
    y: fx.Node
    b: fx.Node
    scale: fx.Node | None
    alpha: float
    columns: tuple[int, int]  # the first, and the one after the last
    casts: list[fx.Node]


def _rows(gm: fx.GraphModule) -> set[fx.Node]:
    """The vectors among what depends on adapter parameters alone, if results that they scale may be kept."""
    if overwrites(gm):
        return set()
    values = ((node, value_of(gm, node)) for node in parameter_work(gm))
    # In float16 no number is so small that it is as good as none.
    return {
        node
        for node, value in values
        if isinstance(value, Tensor) and value.dim() == 1 and value.dtype is not torch.float16
    }


def _sums(gm: fx.GraphModule, product: fx.Node, rows: set[fx.Node]) -> list[Sum]:
    """What all of `product` goes into, if that is sums of sites that can be computed where the first of them stands."""
    sums: list[Sum] = []
    for part, columns in _parts(gm, product):
        made = _sum(gm, product, part, columns, rows)
        if made is None:
            return []
        sums.append(made)
    sums.sort(key=lambda made: made.columns)
    # All columns, one after the other: for what is left of a product it is not gathered.
    bounds = [0, *(made.columns[1] for made in sums)]
    if not sums or [made.columns[0] for made in sums] != bounds[:-1] or bounds[-1] != _width(gm, product):
        return []
    place = min(made.node for made in sums)
    moved = sorted([product, *(made.y for made in sums)])
    if must_not_move(gm, moved[0], moved[-1]):
        return []
    known = (reads_tensor(gm, read) or read < place for made in sums for read in _operands(made))
    return sums if all(known) else []


def _parts(gm: fx.GraphModule, product: fx.Node) -> Iterator[tuple[fx.Node, tuple[int, int]]]:
    """The nodes that are columns of `product`, with the first one and the one after the last."""
    users = list(product.users)
    if len(users) == 1 and users[0].target is aten.split_with_sizes.default:
        sizes: Any = users[0].args[1]
        for part in users[0].users:
            index: Any = part.args[1]
            yield part, (sum(sizes[:index]), sum(sizes[: index + 1]))
    elif (width := _width(gm, product)) is not None:
        yield product, (0, width)


def _width(gm: fx.GraphModule, product: fx.Node) -> int | None:
    value = value_of(gm, product.all_input_nodes[-1])
    return None if value is None else value.shape[0]


def _sum(
    gm: fx.GraphModule, product: fx.Node, part: fx.Node, columns: tuple[int, int], rows: set[fx.Node]
) -> Sum | None:
    branch = _only_user(part)
    if branch is None or branch.target is not aten.linear.default or len(branch.args) != 2:
        return None
    added, (t, b) = _only_user(branch), branch.args
    if added is None or added.target is not aten.add.Tensor or added.args[1] is not branch:
        return None
    y = added.args[0]
    if not isinstance(y, fx.Node) or y.target is not aten.linear.default or is_inserted(y):
        return None
    if y.args[0] is not product.args[0] or t is not part or not isinstance(b, fx.Node):
        return None
    casts = [user for user in y.users if user.target is aten.type_as.default and user.args[0] is not y]
    if y.users.keys() != {added, *casts} or (casts and not _same_type(gm, y, b)):
        return None
    alpha: Any = added.kwargs.get("alpha", 1.0)
    scaled, scale = _scaled(added, rows, casts)
    return Sum(scaled, y, b, scale, alpha, columns, [cast for cast in casts if cast is not scaled])


def _same_type(gm: fx.GraphModule, y: fx.Node, b: fx.Node) -> bool:
    """Whether the sum of `y` and a branch has the type of `y`."""
    weight, b_value = value_of(gm, y.all_input_nodes[1]), value_of(gm, b)
    return weight is not None and b_value is not None and weight.dtype == b_value.dtype


def _scaled(added: fx.Node, rows: set[fx.Node], casts: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """The product of `added` with one of `rows`, in the type of the site, and the row; `added` itself if there is none.

    None that is shifted before it is cast: it would be rounded, and its parts be kept, once more.
    """
    product = _only_user(added)
    if product is None or product.target is not aten.mul.Tensor or not is_inserted(product) or _is_result(product):
        return added, None
    scale = next((operand for operand in product.args if operand in rows), None)
    if not isinstance(scale, fx.Node) or casts != [*product.users]:
        return added, None
    return casts[0], scale


def _is_result(node: fx.Node) -> bool:
    """Whether the graph returns `node` or what may share its memory, so that the caller might overwrite it."""
    return any(user.op == "output" or (may_return_a_view(user) and _is_result(user)) for user in node.users)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _operands(made: Sum) -> list[fx.Node]:
    return [made.b, *([made.scale] if made.scale else []), *made.y.all_input_nodes]


def _gather(graph: fx.Graph, product: fx.Node, sums: list[Sum]) -> None:
    place = min(made.node for made in sums)
    for made in sums:
        for read in _operands(made):
            if place < read:  # a tensor of the module
                place.prepend(read)
    ranks = tuple(stop - start for start, stop in (made.columns for made in sums))
    products = LowRankProducts(ranks, tuple(made.alpha for made in sums))
    branches: list[Branch[Any]] = []
    for made in sums:
        _, weight, bias = (*made.y.args, None)[:3]
        branches.append(Branch(weight, bias, made.b, made.scale))
    with graph.inserting_before(place):
        call = graph.call_function(products, (*product.args, *flatten(branches)))
        results = [graph.call_function(operator.getitem, (call, 1 + index)) for index in range(len(sums))]
    call.meta = dict(product.meta)
    for made, result in zip(sums, results, strict=True):
        result.meta = dict(made.node.meta)
        made.node.replace_all_uses_with(result)
        for cast in made.casts:
            cast.replace_input_with(made.y, result)
