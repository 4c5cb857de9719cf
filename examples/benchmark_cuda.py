"""What `benchmark.py` measures on a CUDA device if nothing else is asked for, and its table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_cases import tokens_of
from benchmark_report import Result, readable

DEFAULTS: dict[str, Any] = {
    "cases": ["llama-1b"],
    "variants": ["LoRA", "DoRA", "OFT"],
    "measures": ["train-8x2048", "decode"],
    "arms": [
        "peft",
        "peft-compiled",
        "peft-liger",
        "ours",
        "ours-fused",
        "ours-balanced",
        "ours-compiled",
        "ours-frozen",
    ],
    "rounds": 7,
    "dtype": "bfloat16",
    "minutes": 9.0,
}
"""One card runs all of it in ten minutes; the last arms of a slow one are left out, with a note."""


def write_table(path: Path, where: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write the results as the tables of Markdown that `docs/results.md` takes: a row for each arm."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [f"{where['machine']}; {versions}; {where['date']}"]
    for result in (result for result in results if result.unit == "s" and result.ratios):
        peaks = next((other.values for other in results if _is_peak_of(other, result)), {})
        lines += ["", f"{result.case}, {result.measure}, {result.variant}{' (void)' if result.void else ''}", ""]
        lines += ["| | time | of the base | tokens a second | peak above the weights |", "|---|---:|---:|---:|---:|"]
        for arm, seconds in result.values.items():
            speed = f"{tokens_of(result.measure) / seconds:,.0f}"
            peak = readable(peaks[arm], "B") if arm in peaks else ""
            lines.append(f"| `{arm}` | {readable(seconds, 's')} | {result.ratios[arm]:.3f} | {speed} | {peak} |")
        lines += [f"| `{arm}` | {note} | | | |" for arm, note in result.notes.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_peak_of(other: Result, result: Result) -> bool:
    same = (other.case, other.variant) == (result.case, result.variant)
    return same and other.measure == f"peak of {result.measure}"
