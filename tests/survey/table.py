"""Sum up the results of the survey by family: `python -m tests.survey.table` writes them into README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .__main__ import RESULTS, read
from .trial import PATHS, STEPS

README = Path(__file__).parent / "README.md"
_BEGIN = "<!-- what follows is written by tests/survey/table.py -->"
_KINDS = {"yes": "equal", "refused": "refused", "differs": "refused", "wrong": "wrong", "timeout": "over time"}


def kind(said: str | None) -> str:
    """Return how a step ended, in one word: `equal`, `refused`, `wrong`, `over time`, `error`; or `` if not tried."""
    return "" if said is None or said.startswith("none") else _KINDS.get(said.partition(":")[0], "error")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return how each step ended by family; the models that end equal by no path, and those that do not by each."""
    rows = sorted(rows, key=lambda row: (row["family"], row["type"]))
    head = ["family", "tried", "not built", "by default", "with inputs", "by part", "by backend", "equal", "refused"]
    head += ["over time", "error", "wrong", "adapt", "generate", "compiled", "CPU-s, median"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for family in (*families, "all"):
        lines.append(_line([row for row in rows if family in ("all", row["family"])], family))
    refused = [row for row in rows if not paths(row)]
    lines += ["", "Equal by no path:", "", "| model | step | how | reason |", "|---|---|---|---|"]
    lines += [f"| {row['class']} | {step} | {how} | {reason} |" for row in refused for step, how, reason in _ends(row)]
    lines += ["", "Equal by a path, and not by each that was tried:", ""]
    lines += ["| model | equal | step | how | reason |", "|---|---|---|---|---|"]
    for row in rows:
        for step, how, reason in _ends(row) if paths(row) else ():
            lines.append(f"| {row['class']} | {', '.join(paths(row))} | {step} | {how} | {reason} |")
    return "\n".join(lines)


def paths(row: dict[str, Any]) -> list[str]:
    """Return the paths by which a model ends equal."""
    return [step for step in PATHS if row.get("built") == "yes" and kind(row.get(step)) == "equal"]


def _ends(row: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each step that did not end equal: its name, how it ended, and why."""
    for step in ("built", *STEPS):
        said = str(row.get(step, "yes"))
        if said.partition(":")[0] not in ("yes", "none"):
            reason = " ".join(said.partition(": ")[2].split())[:200].replace("|", "\\|").replace("](", "] (")
            yield step, kind(said) if step != "built" else "not built", reason


def _line(rows: Sequence[dict[str, Any]], family: str) -> str:
    built = [row for row in rows if row.get("built") == "yes"]
    ends = [{step: kind(row.get(step)) for step in STEPS} for row in built]
    by_path = [sum(end[path] == "equal" for end in ends) for path in PATHS]
    equal = sum(bool(paths(row)) for row in built)
    # A model that ends equal by no path counts by the first that was tried; diffusers are tried with inputs only.
    others = [next(filter(None, end.values()), "") for row, end in zip(built, ends, strict=True) if not paths(row)]
    unequal = [others.count(word) for word in ("refused", "over time")]
    faults = [sum(word in end.values() for end in ends) for word in ("error", "wrong")]
    # Of the later steps, not all models were tried, and not all classes generate.
    later = [
        f"{sum(end[step] == 'equal' for end in ends)} of {sum(bool(end[step]) for end in ends)}"
        for step in STEPS
        if step not in PATHS
    ]
    seconds = [row["default_seconds"] for row in built if row.get("default") == "yes"]
    median = f"{statistics.median(seconds):.0f}" if seconds else ""
    cells = (family, len(rows), len(rows) - len(built), *by_path, equal, *unequal, *faults, *later, median)
    return f"| {' | '.join(map(str, cells))} |"


def write() -> None:
    """Write the summary into the README."""
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    text = README.read_text().partition(_BEGIN)[0]
    README.write_text(f"{text}{_BEGIN}\n\n{summary(rows)}\n")


if __name__ == "__main__":
    write()
