"""Print the account as a page: `python -m tests.fuzz.account_page` writes docs/account.md."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.account import PATHS, Row
from tests.fuzz.account_rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "account.md"

HEAD = """# What a call depends on

A call of a model depends on more than its parameters. This table lists each dependency, and what the next call of an
adapted model does when it changes after `rewrite` (with example inputs, or traced without), `adapt`, `wrap` or
`backend`. Where the table says "before capture", the change was made before.

- **followed**: the call gives what the eager model gives, with the same adapters.
- **refused**: an error or a warning names the change.
- **ignored**: the call gives what it gave before, for the reason below the table.
- **n/a**: this path has no such change.

No dependency is left open. `tests/fuzz/test_account.py` checks each cell, and this page is printed by
`python -m tests.fuzz.account_page`.
"""


def page() -> str:
    """Return the page."""
    notes: dict[str, int] = {}
    lines = [HEAD, f"| dependency | {' | '.join(PATHS)} |", "|---|" + "---|" * len(PATHS)]
    group = ""
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** |{' |' * len(PATHS)}")
        lines.append(f"| {row.name} | {' | '.join(_cell(row, path, notes) for path in PATHS)} |")
    lines += ["", *(f"{number}. {note[0].upper()}{note[1:]}." for note, number in notes.items())]
    return "\n".join(lines) + "\n"


def _cell(row: Row, path: str, notes: dict[str, int]) -> str:
    """Return a cell: its word, and the number of its reason."""
    word, _, reason = row.cells[path].partition(": ")
    return f"{word} ({notes.setdefault(reason, len(notes) + 1)})" if reason else word


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
