"""Gather the products of banks that read one input, with those of their sites, into one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ...graph.insertion import is_inserted
from ...graph.layers import calls_in
from ...graph.parameter_work import first_input
from ...graph.queries import before_cast, obstacle_between, reads_tensor, value_of
from ...ops.bank_products import BankProducts, rows_or_slots
from ...ops.low_rank_branch import Branch, flatten
from ...ops.low_rank_products import LowRankProducts
from ..pipeline import Declined, GraphPass, Outcome
from .gather_products import insert_gathered

aten = torch.ops.aten


@dataclass(frozen=True)
class GatherBankProducts(GraphPass):
    """Make one operation of the low-rank products of a bank and the sums that they go into, as `GatherProducts` does.

    The factors of the rows of the batch are selected, those of sites with one input side by side; both factors of a row
    without an adapter are zero. Where they are kept, `BankProducts` may sort the rows by slot in place of that. Safe
    because it computes the same sums: zero times a finite input is zero, which leaves every number that it is added to
    as it is; it overwrites only outputs of sites that nothing else reads; and it moves nothing across a write in place
    or a change of the mode of autograd or autocast.
    """

    def run(self, gm: fx.GraphModule) -> Outcome:
        declined = []
        sums: list[_Sum] = []
        for node in gm.graph.find_nodes(op="call_function", target=aten.where.self):
            if is_inserted(node) and (found := _sum(gm, node)) is not None:
                if isinstance(found, str):
                    declined.append(Declined.at([node], found))
                else:
                    sums.append(found)
        groups: list[list[_Sum]] = []
        for term in sorted(sums, key=lambda term: term.node):
            last = groups[-1] if groups else []
            if last and not _why_not_together(gm, [*last, term]):
                last.append(term)
            elif why := _why_not_together(gm, [term]):
                declined.append(Declined.at([term.node], why))
            else:
                groups.append([term])
        for group in groups:
            _gather(group)
        return Outcome(len(groups), tuple(declined))


class _Sum(NamedTuple):
    """The sum `where(acts, add(y, bmm(bmm(x, a^T), b^T), alpha), y)` of a site `y` of `x`, with factors for each row.

    Where the factors have another type than the site, `x` is cast before, and the sum after.

    Args:
        node: the node of the result.
        y, a, b, alpha: the terms.
        acts: whether a row has an adapter, `(batch, 1, 1)`.
    """

    node: fx.Node
    y: fx.Node
    a: fx.Node
    b: fx.Node
    alpha: float
    acts: fx.Node

    @property
    def x(self) -> fx.Node:
        """The input of the site."""
        return self.y.all_input_nodes[0]

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes that are read, but for the input."""
        return [self.a, self.b, self.acts, *self.y.all_input_nodes[1:]]


def _sum(gm: fx.GraphModule, where: fx.Node) -> _Sum | str | None:
    """Return the sum that is the choice of `where`; the reason why it is not one; None if it is no choice of rows."""
    acts, chosen, y = where.args
    if not (isinstance(acts, fx.Node) and isinstance(chosen, fx.Node) and isinstance(y, fx.Node) and is_inserted(acts)):
        return None
    total: Any = chosen.args[0] if chosen.target is aten.type_as.default and chosen.args[1] is y else chosen
    if total.target is not aten.add.Tensor or total.args[0] is not y:
        return "the adapter does more than add a branch to the output of its site"
    if y.target is not aten.linear.default or is_inserted(y):
        return "the branch is not added to the output of a linear"
    if y.users.keys() != {total, chosen, where} or {*total.users, *chosen.users} - {chosen} != {where}:
        return "the output of the site is read elsewhere too"
    second = _product_of_rows(total.args[1], total)
    first = _product_of_rows(second.args[0], second) if second is not None else None
    if first is None or second is None or before_cast(first.args[0]) is not y.args[0]:
        return "other operations stand between the site's input and its sum"
    a, b = first.all_input_nodes[1].all_input_nodes[0], second.all_input_nodes[1].all_input_nodes[0]
    dtypes = {value.dtype for node in (y.all_input_nodes[1], a, b) if (value := value_of(gm, node)) is not None}
    if len(dtypes) > 1 and chosen is total:
        return "the sum has another type than the factors"
    alpha: Any = total.kwargs.get("alpha", 1.0)
    return _Sum(where, y, a, b, alpha, acts)


def _product_of_rows(node: Any, reader: fx.Node) -> fx.Node | None:
    """Return `node` if it is `bmm(x, m^T)`, and `reader` alone reads it."""
    if not isinstance(node, fx.Node) or node.target is not aten.bmm.default or node.users.keys() != {reader}:
        return None
    turned = node.args[1]
    return node if isinstance(turned, fx.Node) and turned.target is aten.mT.default else None


def _why_not_together(gm: fx.GraphModule, sums: Sequence[_Sum]) -> str:
    """Return why sums cannot be computed where the first of them stands; empty if they can."""
    if len({term.x for term in sums}) > 1:
        return "they read different inputs"
    if len(set(map(calls_in(gm), (term.node for term in sums)))) > 1:
        return "they are of different layers, or of modules on which hooks stand"
    place = min(term.node for term in sums)
    moved = sorted(term.y for term in sums)
    if why := obstacle_between(gm, moved[0], max(moved[-1], place)):
        return why
    known = (reads_tensor(gm, read) or read < place for term in sums for read in _needed(term))
    return "" if all(known) else "a term is computed only after the first sum"


def _needed(term: _Sum) -> list[fx.Node]:
    """Return what must be there before a sum: its operands, or what rows are selected from."""
    needed: list[fx.Node] = []
    for read in term.operands:
        needed += read.all_input_nodes if read.target in _SELECTIONS else [read]
    return needed


_SELECTIONS = frozenset({aten.index_select.default, aten.view.default})


def _gather(sums: Sequence[_Sum]) -> None:
    place = min(term.node for term in sums)
    for term in sums:
        for read in term.operands:
            if place < read:  # a tensor of the module, or a selection of its rows
                for operand in read.all_input_nodes:
                    if place < operand:
                        place.prepend(operand)
                place.prepend(read)
    first = sums[0]
    ranks = tuple(int(term.a.meta["val"].shape[1]) for term in sums)
    products: Any = LowRankProducts(ranks, tuple(term.alpha for term in sums))
    a, bs = [term.a for term in sums], [term.b for term in sums]
    more: tuple[fx.Node, ...] = ()
    if (ids := _kept_ids(sums)) is not None:
        products, more = BankProducts(products), (ids,)
        joined = _side_by_side([_stack(node) for node in a], place)
        factor_a = _inserted(first.a, rows_or_slots, (joined, ids), place)
        factors_b = [_inserted(node, rows_or_slots, (_stack(node), ids), place) for node in bs]
    else:
        factor_a = _or_zero(first.acts, _side_by_side(a, place), place)
        factors_b = [_or_zero(term.acts, term.b, place) for term in sums]
    branches: list[Branch[Any]] = []
    for term, b in zip(sums, factors_b, strict=True):
        _, weight, bias = (*term.y.args, None)[:3]
        branches.append(Branch(weight, bias, b, None))
    args = (first.x, factor_a, *more, *flatten(branches))
    insert_gathered(place, products, args, first.node, [term.node for term in sums], None)


def _kept_ids(sums: Sequence[_Sum]) -> fx.Node | None:
    """Return the ids if the program keeps what depends on them and on parameters alone, see `read_ids`."""
    selected = [node for term in sums for node in (term.a, term.b)]
    if any(node.target is not aten.index_select.default for node in selected):
        return None
    clamped = selected[0].args[2]
    ids = clamped.all_input_nodes[0] if isinstance(clamped, fx.Node) else None
    is_kept = (
        ids is not None and ids.op == "get_attr" and all(_stack(node) < first_input(node.graph) for node in selected)
    )
    return ids if is_kept else None


def _stack(selection: fx.Node) -> fx.Node:
    """Return the factors of all slots, of which a node selects those of the rows."""
    return selection.all_input_nodes[0]


def _side_by_side(factors: list[fx.Node], place: fx.Node) -> fx.Node:
    if len(factors) == 1:
        return factors[0]
    return _inserted(factors[0], aten.cat.default, (factors, 1), place)


def _or_zero(acts: fx.Node, factors: fx.Node, place: fx.Node) -> fx.Node:
    """Insert the factors of the rows that have an adapter, and zeros for the others."""
    return _inserted(factors, aten.where.ScalarOther, (acts, factors, 0.0), place)


def _inserted(like: fx.Node, target: Any, args: tuple[Any, ...], place: fx.Node) -> fx.Node:
    """Insert a node of the adapter of `like`; before the inputs, as parameter work, if all that it reads is there."""
    graph = place.graph
    front = first_input(graph)
    node = graph.call_function(target, args)
    (front if all(read < front for read in node.all_input_nodes) else place).prepend(node)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    return node
