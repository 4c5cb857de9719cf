"""What is known of the rows of the batch in a value of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

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
