"""Run the survey: `python -m tests.survey [types ...]`; see README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from .cases import Case, cases, diffusers_cases, timm_cases
from .trial import STEPS, try_model

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types to try; all without")
    parser.add_argument("--results", type=Path, default=RESULTS / "transformers.jsonl")
    parser.add_argument("--again", action="store_true", help="try also what the results have; the last line counts")
    parser.add_argument("--failed", action="store_true", help="try again what did not end with yes")
    parser.add_argument("--limit", type=int, default=60, help="CPU seconds for a model")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS, help="what to try; all without")
    parser.add_argument("--every-class", action="store_true", help="all classes of each model type")
    parser.add_argument("--timm", action="store_true", help="the models of timm instead")
    parser.add_argument("--diffusers", action="store_true", help="the models of diffusers instead")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.timm:
        found = timm_cases()
    else:
        found = diffusers_cases() if arguments.diffusers else cases(arguments.every_class)
    if arguments.types:
        found = [case for case in found if case.name in arguments.types]
    rows = [] if arguments.again else read(arguments.results)
    done = {row["key"] for row in rows if _is_done(row, arguments.steps, arguments.failed)}
    for case in found:
        if case.key not in done:
            row = run(case, arguments.steps, arguments.limit)
            arguments.results.parent.mkdir(exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{case.key}: {row.get('default', row.get('built'))}"[:150], flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file, of each model the last of each step."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        before = rows.get(row["key"], {})
        rows[row["key"]] = {name: value for name, value in before.items() if not _is_stale(name, row)} | row
    return list(rows.values())


def _is_stale(name: str, row: dict[str, Any]) -> bool:
    """Tell whether what an earlier run found is of a step that `row` holds anew, such as its warnings."""
    of_default = name in ("fixed", "equal_in_double_precision", "not_wrapped") or name.startswith("not_tried")
    return any(name.startswith(f"{step}_") for step in STEPS if step in row) or (of_default and "default" in row)


def _is_done(row: dict[str, Any], steps: list[str], failed: bool) -> bool:
    """Tell whether a model need not be tried again: all steps were tried, or went well if what failed is asked for."""
    if row.get("built") != "yes":
        return not failed
    ends = [row.get(step) for step in steps]
    return all(end is not None and (not failed or end.partition(":")[0] in ("yes", "none")) for end in ends)


def run(case: Case, steps: list[str], limit: int) -> dict[str, Any]:
    """Try a model in a process of its own, and return what is known of it when that ends or its time is over."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_try, args=(case, steps, limit, sender), daemon=True)
    process.start()
    sender.close()
    row: dict[str, Any] = {"key": case.key, "family": case.family, "type": case.name, "class": case.model}
    end = time.monotonic() + 10 * limit  # of a process that waits for something
    with contextlib.suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            row |= receiver.recv()
    process.kill()
    process.join()
    step = next((step for step in ("built", *steps) if step not in row), None)
    if step is not None and row.get("built", "yes") == "yes":
        row[step] = (
            f"timeout: more than {limit} s" if process.exitcode == -signal.SIGXCPU else "error: the process died"
        )
    return row


def _try(case: Case, steps: list[str], limit: int, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # the first ends it with SIGXCPU
    torch.set_num_threads(1)
    try:
        try_model(case.builder(), steps, lambda **known: sender.send(known))
    finally:
        sender.close()
        os._exit(0)


if __name__ == "__main__":
    main()
