"""Sum up the results of the survey by family: `python -m tests.survey.table` writes them into README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .__main__ import RESULTS, read
from .trial import STEPS

README = Path(__file__).parent / "README.md"
_BEGIN = "<!-- what follows is written by tests/survey/table.py -->"
_KINDS = {"yes": "equal", "refused": "refused", "differs": "refused", "wrong": "wrong", "timeout": "over time"}


def kind(said: str | None) -> str:
    """Return how a step ended, in one word: `equal`, `refused`, `wrong`, `over time`, `error`, or `` if not tried."""
    return "" if said is None else _KINDS.get(said.partition(":")[0], "error")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table by family, the names of what is fixed or left out, and what is refused with its reason."""
    head = ("family", "tried", "not built", "by default", "with inputs", "by either", "refused", "error", "wrong")
    lines = [f"| {' | '.join((*head, 'over time', 'CPU-s, median'))} |", "|---" * (len(head) + 2) + "|"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for family in (*families, "all"):
        lines.append(_line(family, [row for row in rows if family in ("all", row["family"])]))
    lines += ["", "What does not end equal:", "", "| model | how | reason |", "|---|---|---|"]
    for row in rows:
        how = row.get("default") or row.get("built")
        if how != "yes":
            said = kind(how) if row.get("built") == "yes" else "not built"
            reason = " ".join(str(how).partition(": ")[2].split())[:200].replace("|", "\\|").replace("](", "] (")
            lines.append(f"| {row['class']} | {said} | {reason} |")
    return "\n".join(lines)


def _line(family: str, rows: Sequence[dict[str, Any]]) -> str:
    built = [row for row in rows if row.get("built") == "yes"]
    ends = [[kind(row.get(step)) for step in STEPS] for row in built]
    either = sum("equal" in end for end in ends)
    others = [sum(end[0] == word for end in ends) for word in ("refused", "error", "wrong", "over time")]
    steps = [sum(end[index] == "equal" for end in ends) for index in range(2)]
    seconds = [row["default_seconds"] for row in built if row.get("default") == "yes"]
    median = f"{statistics.median(seconds):.0f}" if seconds else ""
    return f"| {' | '.join(map(str, (family, len(rows), len(rows) - len(built), *steps, either, *others, median)))} |"


def write() -> None:
    """Write the summary into the README."""
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    text = README.read_text().partition(_BEGIN)[0]
    README.write_text(f"{text}{_BEGIN}\n\n{summary(rows)}\n")


if __name__ == "__main__":
    write()
