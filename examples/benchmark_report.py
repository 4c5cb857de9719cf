"""The results of `benchmark.py`: whether arms agree, and ratios to the base as a table, as JSON and as a picture."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.lines import Line2D
from torch import Tensor

VALID = (0.97, 1.03)
"""The limits within which base/base must lie for a timing to count."""


@dataclass
class Result:
    """One measure of one step with one adapter, of all arms.

    Args:
        case, measure, variant: the names of the case, the measure and the adapter.
        unit: the unit of the values.
        values: the value of each arm; the median if there are several.
        ratios: the ratio of each arm's value to the base's.
        paired: of timings, for each arm, the median of the ratios within each round, and their quartiles.
        void: of timings, why they do not count; empty if they do.
        notes: for each arm that was not measured, the reason.
    """

    case: str
    measure: str
    variant: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    paired: dict[str, list[float]] = field(default_factory=dict)
    void: str = ""
    notes: dict[str, str] = field(default_factory=dict)


def of_values(result: Result, values: Mapping[str, float]) -> Result:
    """Fill in values that need no statistics, and return `result`."""
    result.values = dict(values)
    if base := values.get("base"):
        result.ratios = {arm: value / base for arm, value in values.items()}
    return result


def of_rounds(result: Result, seconds: Mapping[str, Sequence[float | None]]) -> Result:
    """Fill in timings and return `result`.

    Args:
        result: the result to fill in.
        seconds: of each arm in each round, None if it took no part; "base" and "base-again" take part in all.
    """
    result.values = {arm: median(_present(times)) for arm, times in seconds.items()}
    result.ratios = {arm: value / result.values["base"] for arm, value in result.values.items()}
    for arm, times in seconds.items():
        pairs = [time / base for time, base in zip(times, seconds["base"], strict=True) if time and base]
        result.paired[arm] = [median(pairs), *(quantiles(pairs)[::2] if len(pairs) > 1 else pairs * 2)]
    twice = (result.ratios["base-again"], result.paired["base-again"][0])
    if not all(VALID[0] <= ratio <= VALID[1] for ratio in twice):
        result.void = f"base/base is {twice[0]:.3f} (paired {twice[1]:.3f}), outside {VALID[0]}-{VALID[1]}"
    return result


def _present(times: Iterable[float | None]) -> list[float]:
    return [time for time in times if time is not None]


# Agreement.


def disagreement(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, trained: bool) -> str:
    """Say where the results of two arms differ; return an empty string if they agree.

    Args:
        results, expected: the results of the two arms, from `Arm.results`.
        tolerance: the largest norm of a difference, relative to the norm of the expected tensor.
        trained: whether gradients of parameters must be among the results.
    """
    needed = {name for name in expected if trained or not name.startswith("gradient of ")}
    if needed != results.keys():
        return f"{', '.join(sorted(needed ^ results.keys())[:3])}: in one arm alone"
    floor = 1e-3 * max(tensor.float().norm().item() for tensor in expected.values())
    worst, where = 0.0, ""
    for name in sorted(needed):
        result, right = results[name].float(), expected[name].float()
        if result.shape != right.shape:
            return f"{name}: shape {tuple(result.shape)} instead of {tuple(right.shape)}"
        # Measure a gradient that should be zero by the size of the others, because it is rounding noise.
        scale = right.norm().item() if name.startswith("output") else max(right.norm().item(), floor)
        difference = (result - right).norm().item() / scale
        if not difference <= max(tolerance, worst):
            worst, where = difference, f"{name}: off by {difference:.1e} of its size"
    return where


# Where and how.


def circumstances(settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the machine, the versions, the date and the settings of a run."""
    packages = ("torch", "transformers", "peft", "lora_lite_fx")
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "settings": dict(settings),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


# JSON.


def write(path: Path, where: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write all results as JSON."""
    rounded = json.loads(
        json.dumps([asdict(result) for result in results]), parse_float=lambda x: float(f"{float(x):.5g}")
    )
    path.write_text(json.dumps({**where, "results": rounded}, indent=1) + "\n", encoding="utf-8")


def read(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Result]]:
    """Read files of `write`: all their results, and the circumstances of the first file with the settings of each."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results = [Result(**result) for file in files for result in file.pop("results")]
    settings = [file["settings"] for file in files]
    return files[0] | {"settings": settings if len(files) > 1 else settings[0]}, results


# The table.


def table(where: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Return a table for each measure of each case: variants down, arms across, ratios to the base; then the notes."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [f"{where['machine']}; {where['system']}; {versions}; {where['date']}"]
    for case, measure in dict.fromkeys((result.case, result.measure) for result in results):
        lines += ["", *_block([result for result in results if (result.case, result.measure) == (case, measure)])]
    return "\n".join(lines)


def _block(rows: Sequence[Result]) -> list[str]:
    arms = list(dict.fromkeys(arm for row in rows for arm in (*row.values, *row.notes)))
    head = [f"{rows[0].case}, {rows[0].measure}", *arms]
    body = [[row.variant + (" (void)" if row.void else ""), *(_cell(row, arm) for arm in arms)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in (head, *body)]
    lines += [f"  {row.variant} is void: {row.void}" for row in rows if row.void]
    lines += [f"  {row.variant}, {arm}: {note}" for row in rows for arm, note in row.notes.items()]
    return lines


def _cell(row: Result, arm: str) -> str:
    if arm not in row.values:
        return "-"
    if arm == "base" or arm not in row.ratios:
        return readable(row.values[arm], row.unit)
    if arm in row.paired:
        return f"{row.ratios[arm]:.3f} ({row.paired[arm][0]:.3f})"
    return f"{row.ratios[arm]:.3f}"


def readable(value: float, unit: str) -> str:
    """Return a value with its unit, in thousands if that is shorter."""
    if unit == "s":
        return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:g} {unit}".strip()


# The picture.


def draw(where: Mapping[str, Any], results: Sequence[Result], path: Path) -> None:
    """Write a PNG of all ratios: a panel for each measure, a row for each case and variant, a colour for each arm."""
    matplotlib.use("Agg")  # needs no display
    results = [result for result in results if result.ratios]
    measures = list(dict.fromkeys(result.measure for result in results))
    if not measures:
        return
    arms = list(dict.fromkeys(arm for result in results for arm in result.ratios if not arm.startswith("base")))
    colours = {arm: pyplot.colormaps["tab10"](number) for number, arm in enumerate(arms)}
    rows = [[result for result in results if result.measure == measure] for measure in measures]
    heights = [len(panel) + 2 for panel in rows]
    figure, axes = pyplot.subplots(
        len(measures),
        figsize=(10, 1.5 + 0.24 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel, measure in zip(axes[:, 0], rows, measures, strict=True):
        _panel(axis, panel, colours)
        axis.set_title(f"{measure}: ratio to the frozen base", fontsize="medium", loc="left")
    handles = [Line2D([], [], color=colour, marker="o", ls="", label=arm) for arm, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8), fontsize="small")
    figure.supxlabel(f"{where['machine']}, torch {where['versions']['torch']}, {where['date']}", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, panel: Sequence[Result], colours: Mapping[str, Any]) -> None:
    for place, result in enumerate(panel):
        for arm, colour in colours.items():
            if arm in result.ratios:
                # Draw a void run hollow.
                face = "none" if result.void else colour
                axis.plot(result.ratios[arm], place, "o", ms=5, mec=colour, mfc=face, alpha=0.8)
    axis.set_yticks(range(len(panel)), [f"{result.case}  {result.variant}" for result in panel], fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xscale("log")
    ratios = [result.ratios[arm] for result in panel for arm in colours if arm in result.ratios] or [1.0]
    lowest, highest = min(*ratios, 0.98) / 1.02, max(*ratios, 1.1) * 1.02
    ticks = (0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 300)
    shown = [tick for tick in ticks if lowest <= tick <= highest and (highest < 3 or tick != 1.05)]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown], fontsize="small")
    axis.set_xlim(lowest, highest)
    axis.minorticks_off()
    axis.axvline(1, color="black", lw=0.8)
    axis.grid(alpha=0.3)
