"""What is known of the rows of the batch in a value, and what an operator does to them.

The rules give the state of a result from those of its operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.modes import by_mode
from ...graph.queries import argument_of, line_of
from .operator_classes import (
    CASTS,
    CONSTANTS,
    PLACED_BY_VALUE,
    SAME_ELEMENTS,
    dimensions_along,
    is_of_each_row,
    plain_name,
    sums_up,
)

BATCH = 2**61 - 1
"""Stands for the number of rows where sizes are computed: a prime that divides no other size."""


@dataclass(frozen=True)
class Rows:
    """A dimension of a value counts the rows of the batch.

    Args:
        dim: the dimension.
        before: what the rows are joined with in the dimension, if they are: how often the first entry of each row comes
            before the second one of any. It is 1 where rows are the outermost factor.
        source: the first of the inputs whose rows these are; empty for a value that is the same in each row.
        order: the sorting that has permuted the entries of the dimension; None for the order of the inputs.
        points: `(order,)`, if the entries are the numbers of places in that order: each is the place of its own row.
        repeats: how many places have the same number, if these were divided.
    """

    dim: int
    before: int = 1
    source: str = ""
    order: fx.Node | None = None
    points: tuple[fx.Node | None, ...] = ()
    repeats: int = 1

    @property
    def place(self) -> tuple[Any, ...]:
        """What two dimensions of one size have in common if their entries belong to the same rows."""
        return self.before, self.order


@dataclass(frozen=True)
class Lost:
    """The rows cannot be told any more.

    Args:
        why: the operation that loses them, with its line in the model's code.
        is_one: whether the value is one for all rows, such as their mean. It tells nothing of an order, so that it may
            meet rows as a value that does not depend on them does.
    """

    why: str
    is_one: bool = False


State = Rows | Lost | list[Any] | None
"""None for a value that does not depend on rows; a list for an operation with several results."""


class RowRules:
    """The rules, for the operators of one graph.

    Sizes are compared as numbers, with primes for symbols, so that products of sizes are compared by arithmetic.

    Args:
        batch: the names of the size of the batch, which is `BATCH`.
    """

    def __init__(self, batch: Iterable[str]) -> None:
        self.batch = frozenset(batch)
        self._numbers: dict[Any, int] = {}
        self._symbols: dict[Any, Any] = {}
        self._met: dict[str, str] = {}  # inputs that have the same rows, because their values meet

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the sizes of a value as numbers."""
        return self._shape(node.meta["val"])

    def _shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else self._number(size) for size in value.shape)

    def _number(self, size: torch.SymInt) -> int:
        import sympy

        expression = size.node.expr  # nothing public tells how a size is computed of others
        if expression not in self._numbers:
            for symbol in expression.free_symbols - self._symbols.keys():
                prime = BATCH if str(symbol) in self.batch else sympy.nextprime(10_000 + 97 * len(self._symbols))
                self._symbols[symbol] = sympy.Integer(prime)
            is_batch = str(expression) in self.batch
            self._numbers[expression] = BATCH if is_batch else int(expression.xreplace(self._symbols))
        return self._numbers[expression]

    def root(self, source: str) -> str:
        """Return one name for all inputs that are shown to have the same rows."""
        while source in self._met:
            source = self._met[source]
        return source

    def without_rows(self, node: fx.Node, name: str, one: Lost | None) -> State:
        """Return the state of what is computed of values without rows; `one` is one for all rows, or None."""

        def of(value: Tensor) -> State:
            dims = [dim for dim, size in enumerate(self._shape(value)) if size % BATCH == 0]
            if not dims:
                return one
            if one is None and len(dims) == 1 and name in CONSTANTS:
                return Rows(dims[0])
            if name == "arange" and (argument_of(node, "start") or 0, argument_of(node, "step") or 1) == (0, 1):
                return Rows(0, points=(None,))
            return lost(node)

        return _of_each(node.meta["val"], of)

    def with_rows(self, node: fx.Node, name: str, rows: Mapping[fx.Node, Rows], states: Mapping[Any, State]) -> State:
        """Return the state of what is computed of values with rows, and of others that do not depend on them."""
        first, state = next(iter(rows.items()))
        old = self.shape(first)
        if name in SAME_ELEMENTS:
            return self._laid_out(node, state, old)
        if name in CASTS or name in ("expand", "slice"):
            found = self._found(node, state, old[state.dim])
            if isinstance(found, Rows):
                return replace(found, points=state.points, repeats=state.repeats)  # all rows, in their order
        if name == "floor_divide" and state.points == (None,) and type(divisor := node.args[1]) is int:
            return replace(state, repeats=state.repeats * divisor)
        if name in ("index", "unsafe_index", "index_select"):
            return self._picked(node, name, states)
        if name == "index_put":
            return self._put(node, states)
        if name in ("sort", "argsort") and len(old) == 1:
            return self._sorted(node, name, state)
        if name == "einsum":
            return self._einsum(node, rows)
        if name in ("repeat", "repeat_interleave"):
            return self._repeated(node, name, state, old)
        if name in PLACED_BY_VALUE:
            is_placed = states.get(node.args[PLACED_BY_VALUE[name]]) is not None
            return lost(node) if is_placed else self._each(node, rows)
        if node.target is not by_mode and not is_of_each_row(node, name):
            for operand, own in rows.items():
                along = dimensions_along(node, name, operand)
                if along is None or own.dim in along:
                    return lost(node, along is not None and sums_up(node, name))
        return self._each(node, rows)

    def _each(self, node: fx.Node, rows: Mapping[fx.Node, Rows]) -> State:
        """Return the state of a result each of whose rows is computed of the same row of the operands."""
        # If the rows of two operands did not meet, two dimensions of the result would have their size, or none.
        places = {(own.place, self.shape(each)[own.dim]) for each, own in rows.items()}
        ((_, size), *others) = places
        return lost(node) if others else self._found(node, self._joined(rows.values()), size)

    def _joined(self, rows: Iterable[Rows]) -> Rows:
        """Return the state of what is computed of the same rows of several values, whose inputs then have the same."""
        state, *others = sorted(rows, key=lambda each: not each.source)
        for other in others:
            if other.source and self.root(other.source) != self.root(state.source):
                self._met[self.root(other.source)] = self.root(state.source)
        return state

    def _found(self, node: fx.Node, state: Rows, size: int) -> State:
        """Return the state with the one dimension of a result that has the size of the rows; lost if not one has."""

        def of(value: Tensor) -> State:
            dims = [dim for dim, own in enumerate(self._shape(value)) if own == size]
            return replace(state, dim=dims[0], points=(), repeats=1) if len(dims) == 1 else lost(node)

        return _of_each(node.meta["val"], of)

    def _laid_out(self, node: fx.Node, state: Rows, old: tuple[int, ...]) -> State:
        """Return where the rows are when the same elements, in the same order, get another shape."""
        before, passed = math.prod(old[: state.dim]) * state.before, 1
        for dim, size in enumerate(self.shape(node)):
            if before % passed == 0 and size * passed % (before * BATCH) == 0:
                points = state.points if size == old[state.dim] else ()
                return replace(state, dim=dim, before=before // passed, points=points)
            passed *= size
        return lost(node)

    def _picked(self, node: fx.Node, name: str, states: Mapping[Any, State]) -> State:
        """Return the state of entries that are picked by number."""
        arguments: Any = node.args
        values, indices, *_ = arguments
        if name == "index_select":
            values, dim, index = (argument_of(node, each) for each in ("self", "dim", "index"))
            indices = [*[None] * (dim % values.meta["val"].dim()), index]
        state, picking = states[values], _picking(indices, states[values])
        rows = {each: own for each in indices if isinstance(own := states.get(each), Rows)}
        if not isinstance(state, Rows) or picking is None:
            return self._each(node, rows | ({values: state} if isinstance(state, Rows) else {}))
        own = rows.get(picking)
        if own is None or own.points != (state.order,) or own.before != state.before:
            return lost(node)
        if self.shape(picking)[own.dim] != self.shape(values)[state.dim] * own.repeats:
            return lost(node)
        return self._each(node, {each: replace(other, source=state.source) for each, other in rows.items()})

    def _put(self, node: fx.Node, states: Mapping[Any, State]) -> State:
        """Return the state of a tensor some of whose entries are replaced."""
        arguments: Any = node.args
        target, indices, values, *_ = arguments
        state, own, picking = states.get(target), states.get(values), _picking(indices, states.get(target))
        others = [each for each in indices if each is not picking and states.get(each) is not None]
        if not isinstance(state, Rows) or others:
            return lost(node)
        if picking is None:  # in all rows
            return self._each(node, {target: state} | ({values: own} if isinstance(own, Rows) else {}))
        picked = states.get(picking)
        if not isinstance(picked, Rows):
            return lost(node)
        if picking.meta["val"].dtype == torch.bool:
            return self._each(node, {target: state, picking: picked}) if own is None else lost(node)
        same_size = self.shape(picking) == self.shape(target)
        is_counted = isinstance(own, Rows) and own.points == (None,) and own.order is None and own.repeats == 1
        is_counted = is_counted and not argument_of(node, "accumulate")
        if same_size and is_counted and picked.points and picked.repeats == 1:
            # The number of each place goes to the place of that number: the numbers the other way round.
            return replace(state, order=picked.points[0], points=(picked.order,))
        return lost(node)

    def _sorted(self, node: fx.Node, name: str, state: Rows) -> State:
        """Return the states of sorted entries, and of the places that they had."""
        values = replace(state, order=node, points=(), repeats=1)
        places = replace(values, points=(None,))
        if state.points and state.repeats == 1 and not argument_of(node, "descending"):
            values = replace(state, order=state.points[0])
            places = replace(values, points=(state.order,))  # the numbers the other way round
        elif state.order is not None:
            return lost(node)
        return places if name == "argsort" else [values, places]

    def _repeated(self, node: fx.Node, name: str, state: Rows, old: tuple[int, ...]) -> State:
        """Return the state of a number of copies of each entry, or of all entries."""
        new, is_flat = self.shape(node), name == "repeat_interleave" and argument_of(node, "dim") is None
        is_by_values = any(isinstance(each.meta["val"], Tensor) for each in node.all_input_nodes[1:])
        if is_flat or is_by_values:
            return lost(node)
        dim = state.dim + len(new) - len(old)
        before = state.before * (new[dim] // old[state.dim] if name == "repeat" else 1)
        return replace(state, dim=dim, before=before, points=(), repeats=1)

    def _einsum(self, node: fx.Node, rows: Mapping[fx.Node, Rows]) -> State:
        """Return the state of a result whose rows have the same letter as those of the operands."""
        arguments: Any = node.args
        equation, operands, *_ = arguments
        terms, _, result = equation.replace(" ", "").partition("->")
        pairs = [] if "." in equation else zip(terms.split(","), operands, strict=True)
        places = {(term[rows[each].dim], rows[each].place) for term, each in pairs if each in rows}
        letter = next(iter(places))[0] if len(places) == 1 else "."
        if letter not in result:
            return lost(node)
        return replace(self._joined(rows.values()), dim=result.index(letter), points=(), repeats=1)


def _of_each(result: Any, of: Callable[[Tensor], State]) -> State:
    """Return the state of each tensor of a result; None of what is not a tensor."""
    if isinstance(result, (list, tuple)):
        return [_of_each(each, of) for each in result]
    return of(result) if isinstance(result, Tensor) else None


def lost(node: fx.Node, is_one: bool = False) -> Lost:
    """Return the state of what a node computes if that loses the rows."""
    return Lost(f"{node.name} ({plain_name(node)}){line_of(node)}", is_one)


def _picking(indices: Any, state: State) -> Any:
    """Return the index that picks along the dimension that counts the rows; None if it picks all of them in order."""
    place = 0
    if not isinstance(state, Rows):
        return None
    for index in indices:
        is_mask = index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)
        last = place + (index.meta["val"].dim() if is_mask else 1)
        if index is not None and place <= state.dim < last:
            return index
        place = last
    return None
