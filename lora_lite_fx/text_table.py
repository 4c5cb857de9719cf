"""Lay out tables as lines of text, and tell names once that differ in an index alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod


def text_table(head: Sequence[str], body: Iterable[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Return the lines of a table, its columns aligned; those with the indices `right` to the right."""
    rows = [tuple(row) for row in body]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, tuple("-" * width for width in widths), *rows)
    ]


@dataclass(frozen=True)
class Folded:
    """Qualified names that differ in an index alone, such as those of a linear in equal layers.

    Args:
        parts: of the names, divided at the dots; in place of an index all the indices.
        members: the place of each name among those that were folded.
    """

    parts: tuple[str | tuple[int, ...], ...]
    members: tuple[int, ...]

    def __str__(self) -> str:
        parts = (part if isinstance(part, str) else ranges(part, "-", ",") for part in self.parts)
        times = prod(len(part) for part in self.parts if not isinstance(part, str))
        return ".".join(parts) + (f" x {times}" if times > 1 else "")


def fold(names: Iterable[tuple[str, Hashable]]) -> list[Folded]:
    """Return names with those told once that differ in an index alone: `layers.0-29.up x 30`.

    An index is a number that another part follows: `layers.3.up`, but not the last one of `mlp.2`.

    Args:
        names: the qualified names; beside each, what must be equal for it to be told with others.

    Returns:
        In the order of the first of each.
    """
    rows = [(Folded(_parts(name), (place,)), rest) for place, (name, rest) in enumerate(names)]
    for place in reversed(range(max((len(row.parts) for row, _ in rows), default=0))):
        alike: dict[tuple[Hashable, Hashable], list[Folded]] = {}
        for row, rest in rows:
            is_index = place < len(row.parts) and not isinstance(row.parts[place], str)
            around = (*row.parts[:place], None, *row.parts[place + 1 :]) if is_index else row.members
            alike.setdefault((around, rest), []).append(row)
        rows = [(_joined(group, place), rest) for (_, rest), group in alike.items()]
    return [row for row, _ in rows]


def _parts(name: str) -> tuple[str | tuple[int, ...], ...]:
    *parts, last = name.split(".")
    return (*((int(part),) if part.isdecimal() and str(int(part)) == part else part for part in parts), last)


def _joined(group: Sequence[Folded], place: int) -> Folded:
    """Return names that differ in their indices at a place as one."""
    first = group[0]
    if len(group) == 1:
        return first
    indices = tuple(sorted(index for row in group for index in row.parts[place] if isinstance(index, int)))
    members = tuple(member for row in group for member in row.members)
    return Folded((*first.parts[:place], indices, *first.parts[place + 1 :]), members)


def ranges(numbers: Iterable[int], dash: str = "\u2013", comma: str = ", ") -> str:
    """Return numbers as text, sorted and with runs taken together: `0-3, 7` with a longer dash."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return comma.join(f"{run[0]}{dash}{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
