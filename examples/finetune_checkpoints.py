"""The checkpoints of `finetune.py`: folders OUT/checkpoint-40, each written whole or not at all. Needs no torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = "run.json"


def newest(out: Path) -> Path | None:
    """Return the checkpoint of the latest step in a folder; None if there is none."""
    steps = {int(match[1]): path for path in _checkpoints(out) if (match := re.search(r"(\d+)$", path.name))}
    return steps[max(steps)] if steps else None


def read(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: `options`, `data`, `device`, `losses`, and the scores `before`.

    Raises:
        OSError: it has been damaged.
    """
    try:
        run: dict[str, Any] = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{checkpoint / RUN} is damaged: {error}") from error
    return run


@contextmanager
def writing(out: Path, step: int, run: dict[str, Any]) -> Iterator[Path]:
    """Write a checkpoint, and delete older ones.

    Yields:
        A folder for its other files. It gets the checkpoint's name when the body has ended.
    """
    delete(out, "*.partial")  # of a run that was killed
    partial = out / f"checkpoint-{step}.partial"
    partial.mkdir()
    (partial / RUN).write_text(json.dumps(run, indent=1), encoding="utf-8")
    yield partial
    new = partial.with_suffix("")
    partial.rename(new)
    for old in _checkpoints(out):
        if old != new:
            shutil.rmtree(old)


def delete(out: Path, pattern: str = "*") -> None:
    """Delete the checkpoints in a folder, and parts of such."""
    for path in out.glob(f"checkpoint-{pattern}"):
        if re.fullmatch(r"checkpoint-\d+(\.partial)?", path.name):
            shutil.rmtree(path)


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
