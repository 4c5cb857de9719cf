"""Lay out a table as lines of text, for the tables that this library prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
