"""Report the passes of an adapted model: their edits, seconds and reasons, program by program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..passes import Declined, PassReport, Program
from ..text_table import ranges


@dataclass(frozen=True)
class ProgramReport:
    """The reports of the passes that derived one program of a model; prints as a table.

    Args:
        program: `training`, `checkpointed` or `inference`.
        passes: one report for each pass, in the order in which they ran.
    """

    program: Program
    passes: tuple[PassReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data, with the fields of `PassReport` for each pass."""
        return asdict(self)

    def __str__(self) -> str:
        width = max((len(report.name) for report in self.passes), default=0)
        lines = [f"passes of the {self.program} program"]
        for report in self.passes:
            edits = f"{report.edits} edit{'s' * (report.edits != 1)}" if report.edits else "no edits"
            lines.append(f"  {report.name:{width}}  {edits:>9}  {1000 * report.seconds:7.1f} ms")
            lines += [f"    {line}" for line in summarized(report.declined)]
        return "\n".join(lines)


def summarized(declined: Iterable[Declined]) -> list[str]:
    """Return the records as lines, with equal layers taken together: `q, k; gate, up: different inputs (layers.0-3)`.

    Semicolons separate the candidates. The name of a site is cut after the first number in it, which is its layer's.
    """
    layers: dict[tuple[str, str, str], list[int]] = {}
    for record in declined:
        prefix, number, names = _split(record.sites)
        layers.setdefault((record.why, prefix, ", ".join(names)), []).extend(number)
    lines: dict[tuple[str, str], list[str]] = {}
    for (why, prefix, candidate), numbers in layers.items():
        where = f" ({prefix}{ranges(set(numbers))})" if numbers else ""
        lines.setdefault((why, where), []).append(candidate)
    return [f"{'; '.join(candidates)}: {why}{where}".removeprefix(": ") for (why, where), candidates in lines.items()]


def _split(sites: Sequence[str]) -> tuple[str, list[int], tuple[str, ...]]:
    """Return the path of the list of layers that `sites` are in, the number of their layer, and their names there.

    Sites of several layers, or outside layers, have no number and keep their names.
    """
    matches = [re.fullmatch(r"((?:[^.\d][^.]*\.)*)(\d+)\.(.+)", site) for site in sites]
    split = [(match[1], int(match[2]), match[3]) for match in matches if match is not None]
    if len(split) == len(sites) and len({(prefix, number) for prefix, number, _ in split}) == 1:
        prefix, number, _ = split[0]
        return prefix, [number], tuple(name for _, _, name in split)
    return "", [], tuple(sites)
