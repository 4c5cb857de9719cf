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
    """Return how a step ended, in one word: `equal`, `refused`, `wrong`, `over time`, `error`; or `` if not tried."""
    return "" if said is None or said.startswith("none") else _KINDS.get(said.partition(":")[0], "error")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return how each step ended by family, and the models that do not end equal, with the reason."""
    rows = sorted(rows, key=lambda row: (row["family"], row["type"]))
    head = ["family", "tried", "not built", "by default", "with inputs", "by either", "refused", "error", "wrong"]
    head += ["over time", "adapt", "generate", "compiled", "CPU-s, median"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for family in (*families, "all"):
        lines.append(_line([row for row in rows if family in ("all", row["family"])], family))
    lines += ["", "What does not end equal:", "", "| model | step | how | reason |", "|---|---|---|---|"]
    for row in rows:
        for step in ("built", *STEPS):
            said = str(row.get(step, "yes"))
            if said.partition(":")[0] not in ("yes", "none"):
                how = kind(said) if step != "built" else "not built"
                reason = " ".join(said.partition(": ")[2].split())[:200].replace("|", "\\|").replace("](", "] (")
                lines.append(f"| {row['class']} | {step} | {how} | {reason} |")
                break  # what comes after is mostly the same
    return "\n".join(lines)


def _line(rows: Sequence[dict[str, Any]], family: str) -> str:
    built = [row for row in rows if row.get("built") == "yes"]
    ends = [{step: kind(row.get(step)) for step in STEPS} for row in built]
    either = sum("equal" in (end["default"], end["inputs"]) for end in ends)
    first = [end["default"] or end["inputs"] for end in ends]  # diffusers are tried with inputs only
    others = [first.count(word) for word in ("refused", "error", "wrong", "over time")]
    equal = {step: sum(end[step] == "equal" for end in ends) for step in STEPS}
    # Of the later steps, not all models were tried, and not all classes generate.
    later = [f"{equal[step]} of {sum(bool(end[step]) for end in ends)}" for step in ("adapt", "generate", "compiled")]
    seconds = [row["default_seconds"] for row in built if row.get("default") == "yes"]
    median = f"{statistics.median(seconds):.0f}" if seconds else ""
    cells = (
        family,
        len(rows),
        len(rows) - len(built),
        equal["default"],
        equal["inputs"],
        either,
        *others,
        *later,
        median,
    )
    return f"| {' | '.join(map(str, cells))} |"


def write() -> None:
    """Write the summary into the README."""
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    text = README.read_text().partition(_BEGIN)[0]
    README.write_text(f"{text}{_BEGIN}\n\n{summary(rows)}\n")


if __name__ == "__main__":
    write()
