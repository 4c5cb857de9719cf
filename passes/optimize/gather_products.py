"""Gather the products of low-rank adapters that read one input, with those of their sites, into one operation."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.insertion import is_inserted
from ...graph.parameter_work import parameter_work
from ...graph.queries import (
    before_cast,
    is_narrow,
    is_product,
    obstacle_between,
    operation_name,
    reads_tensor,
    source_of,
    value_of,
)
from ...graph.walk import walk
from ...graph.writes import may_return_a_view, overwrites
from ...ops.low_rank_branch import Branch, flatten
from ...ops.low_rank_products import LowRankProducts
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class GatherProducts(GraphPass):
    """Make one operation of `t = x A^T` and the sums `alpha t B^T + y` that it goes into, with `y = x W^T + b`.

    The operation adds each branch into the output of its site in place, with no further pass over memory. In the
    backward pass it adds the gradients of `x` that come from q, k, v and their adapters into one tensor. Safe because
    it computes the same sums, it overwrites only outputs of sites that nothing else reads, and it moves nothing across
    a write in place or a change of the mode of autograd or autocast. `LowRankProducts` falls back to the plain products
    where an addition in place would not do the same.

    Where the adapter is wider than the base, as float32 beside bfloat16, the operation casts the input itself, and
    saves it as narrow as it is. The sum is rounded once, as before.

    Fold in DoRA's per-row scale too, unless the result may be overwritten later. Its gradient needs the result, which
    the base usually saves anyway.

    In inference nothing is saved and one token waits for calls, so that the plain operators are quicker there.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        edits = 0
        declined = []
        work = parameter_work(gm)
        rows = _rows(gm, work)
        known = set(work)
        for product in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            if not is_product(product):
                continue
            sums = _sums(gm, product, rows)
            if not isinstance(sums, str):
                _gather(product, sums)
                edits += 1
            elif product not in known and not is_narrow(source_of(product, known)):
                readers = [reader for part, _ in _parts(gm, product) for reader in part.users]
                declined.append(Declined.at(readers or [product], sums))
        return Outcome(edits, tuple(declined))


class Sum(NamedTuple):
    """The sum `scale add(y, linear(t, b), alpha)`, where `t` is some columns of a product, and `y` a site of its input.

    Args:
        node: the node of the sum, after the scale and a cast to the type of `y`.
        y, b, scale, alpha: the terms; `scale` is None if the sum is not scaled.
        columns: the first column of the product, and the one after the last.
        casts: the nodes that cast other values to the type of `y`.
    """

    node: fx.Node
    y: fx.Node
    b: fx.Node
    scale: fx.Node | None
    alpha: float
    columns: tuple[int, int]
    casts: list[fx.Node]


def _rows(gm: fx.GraphModule, work: list[fx.Node]) -> set[fx.Node]:
    """Return the vectors among parameter work, if the results that they scale may be saved for the backward pass."""
    if overwrites(gm):
        return set()
    values = ((node, value_of(gm, node)) for node in work)
    return {node for node, value in values if isinstance(value, Tensor) and value.dim() == 1}


def _sums(gm: fx.GraphModule, product: fx.Node, rows: set[fx.Node]) -> list[Sum] | str:
    """Return the sums that all of `product` goes into; or the reason why they cannot be one operation.

    They can if all of them can be computed where the first of them stands.
    """
    sums: list[Sum] = []
    for part, columns in _parts(gm, product):
        term = _sum(gm, product, part, columns, rows)
        if isinstance(term, str):
            return term
        sums.append(term)
    sums.sort(key=lambda term: term.columns)
    # Fuse only if the sums use every column; otherwise the rest would still need its own product.
    bounds = [0, *(term.columns[1] for term in sums)]
    if not sums or [term.columns[0] for term in sums] != bounds[:-1] or bounds[-1] != _width(gm, product):
        return "the sums do not use every column of the product"
    place = min(term.node for term in sums)
    moved = sorted([product, *(term.y for term in sums)])
    if why := obstacle_between(gm, moved[0], moved[-1]):
        return why
    known = (reads_tensor(gm, read) or read < place for term in sums for read in _operands(term))
    return sums if all(known) else "a term is computed only after the first sum"


def _parts(gm: fx.GraphModule, product: fx.Node) -> Iterator[tuple[fx.Node, tuple[int, int]]]:
    """Yield the nodes that are columns of `product`, with the first column and the one after the last."""
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
) -> Sum | str:
    """Return the sum that these columns of `product` go into; or the reason why the operation cannot compute it."""
    branch = _only_user(part)
    if branch is None:
        return "the product is read in several places"
    if branch.target is not aten.linear.default or len(branch.args) != 2:
        return "other operations stand between the products with A and B"
    added, (t, b) = _only_user(branch), branch.args
    if added is None:
        return "the branch is read in several places"
    if added.target is not aten.add.Tensor or added.args[1] is not branch:
        return f"the branch goes into {operation_name(added)}, not into a sum"
    y = added.args[0]
    if not isinstance(y, fx.Node) or y.target is not aten.linear.default or is_inserted(y):
        return "the branch is not added to the output of a linear"
    if y.args[0] is not before_cast(product.args[0]) or t is not part or not isinstance(b, fx.Node):
        return "the branch reads another value than its site"
    casts = [user for user in y.users if user.target is aten.type_as.default and user.args[0] is not y]
    if y.users.keys() != {added, *casts}:
        return "the output of the site is read elsewhere too"
    weight, b_value = (value_of(gm, operand) for operand in (y.all_input_nodes[1], b))
    # The backward pass divides by the scale, or by a tiny number where it is zero; float16 has none that is so tiny.
    may_scale = weight is not None and weight.dtype is not torch.float16
    node, scale = _scaled(added, rows if may_scale else set(), casts)
    if casts or product.args[0] is not y.args[0]:
        is_same_type = weight is not None and b_value is not None and weight.dtype is b_value.dtype
        node = casts[0] if casts == [*added.users] and not is_same_type else node
        if not is_same_type and node not in casts:
            return "the sum has another type than the output of the site"
    alpha: Any = added.kwargs.get("alpha", 1.0)
    return Sum(node, y, b, scale, alpha, columns, [cast for cast in casts if cast is not node])


def _scaled(added: fx.Node, rows: set[fx.Node], casts: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """Return the node of `added` scaled by one of `rows` and cast to the type of its site, and the row.

    Return `added` and None if it is not scaled; or if it is shifted before the cast, because then the scaled sum would
    be rounded, and saved, once more.
    """
    product = _only_user(added)
    if product is None or product.target is not aten.mul.Tensor or not is_inserted(product) or _is_result(product):
        return added, None
    scale = next((operand for operand in product.args if operand in rows), None)
    if not isinstance(scale, fx.Node) or casts != [*product.users]:
        return added, None
    return casts[0], scale


def _is_result(node: fx.Node) -> bool:
    """Check whether the graph returns `node` or a value that may share its memory: a caller might overwrite it."""
    sharing = walk([node], lambda other: other.users if other is node or may_return_a_view(other) else ())
    return any(other.op == "output" for other in sharing)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _operands(term: Sum) -> list[fx.Node]:
    return [term.b, *([term.scale] if term.scale else []), *term.y.all_input_nodes]


def _gather(product: fx.Node, sums: list[Sum]) -> None:
    place = min(term.node for term in sums)
    for term in sums:
        for read in _operands(term):
            if place < read:  # a tensor of the module
                place.prepend(read)
    ranks = tuple(stop - start for start, stop in (term.columns for term in sums))
    products = LowRankProducts(ranks, tuple(term.alpha for term in sums))
    branches: list[Branch[Any]] = []
    for term in sums:
        _, weight, bias = (*term.y.args, None)[:3]
        branches.append(Branch(weight, bias, term.b, term.scale))
    args = (sums[0].y.args[0], *product.args[1:], *flatten(branches))
    results = insert_gathered(place, products, args, product, [term.node for term in sums], product.meta.get("val"))
    for term, result in zip(sums, results, strict=True):
        for cast in term.casts:
            cast.replace_input_with(term.y, result)


def insert_gathered(
    place: fx.Node, operation: Any, args: tuple[Any, ...], first: fx.Node, sums: Sequence[fx.Node], product: Any
) -> list[fx.Node]:
    """Insert an operation that returns a product and sums, and let the readers of the sums read its results.

    Args:
        place: the node before which it is inserted.
        operation, args: the call.
        first: the node whose name and records it gets.
        sums: the nodes that its further results replace, in order.
        product: the value of the product without data, or None.

    Returns:
        The nodes of these results.
    """
    graph = place.graph
    with graph.inserting_before(place):
        call = graph.create_node("call_function", operation, args, name=f"{first.name}_and_sums")
        results = [
            graph.create_node("call_function", operator.getitem, (call, index), name=f"{node.name}_sum")
            for index, node in enumerate(sums, 1)
        ]
    call.meta = {**first.meta, "val": (product, *(node.meta.get("val") for node in sums))}
    call.meta.pop("tensor_meta", None)  # of `first` alone
    for node, result in zip(sums, results, strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
    return results
