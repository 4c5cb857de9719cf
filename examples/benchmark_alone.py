"""Measure a training step of one arm in a process of its own: its peak, and what comes once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_report as report
from benchmark_arms import Arms, capture, config
from benchmark_cases import CASES
from benchmark_measures import peak, wait
from benchmark_report import Result

import lora_lite_fx as llfx

ALONE = ("memory", "capture", "first-call", "compile")
"""The measures."""
BENCHMARK = Path(__file__).with_name("benchmark.py")


def measure_alone(args: argparse.Namespace, case: str, variant: str) -> Iterator[Result]:
    """Yield the results that need a process of their own, of one case with one adapter."""
    measures = [name for name in ALONE if name in args.measures]
    answers: dict[str, dict[str, Any]] = {}
    for arm in args.arms if measures else ():
        command = [sys.executable, str(BENCHMARK), "--alone", "--cases", case, "--variants", variant, "--arms", arm]
        command += ["--rank", str(args.rank), "--device", args.device, "--dtype", args.dtype]
        with tempfile.TemporaryDirectory() as folder:
            # Give freed memory back at once, and compile everything anew.
            settings = {
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "TORCHINDUCTOR_CACHE_DIR": folder,
            }
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        failed = {"note": f"failed: {done.stderr.strip().splitlines()[-1:]}"}
        answers[arm] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
    notes = {arm: values["note"] for arm, values in answers.items() if "note" in values}
    for name in measures:
        values = {arm: values[name] for arm, values in answers.items() if name in values}
        if name == "memory":
            yield report.of_values(Result(case, name, variant, "B", notes=notes), values)
        else:  # of the base there is the first call alone, so there are no ratios
            yield Result(case, name, variant, "s", values, notes=notes)


def alone(args: argparse.Namespace) -> dict[str, Any]:
    """Return the memory and the seconds that one arm takes, or a note why it was left out."""
    case, name = CASES[args.cases[0]], args.arms[-1]
    step = case.step(case.module(*args.values), "train", *args.values)
    cfg = config(args.variants[0], args.rank, case)
    graph, captured = capture(step, cfg)
    arms = Arms(step, graph, cfg)
    of_peft = arms.seconds_of_peft() if name.startswith("peft") else 0.0
    start = time.perf_counter()
    try:
        arm = arms.make(name)
        made = time.perf_counter() - start
        arm()
        wait(args.device)
        called = time.perf_counter() - start - made
        memory = peak(arm, args.device)
        where = arms.disagreement(arm)
    except llfx.AdapterError as error:
        return {"note": f"not there: {error}"}
    if where:
        return {"note": f"disagrees: {where}"}
    if name.startswith("peft"):  # the arm is read from files, for its values
        made = of_peft
    elif name.startswith(("ours", "merged", "base-graph")) and "adapt" not in name:  # which captures calls itself
        made += captured
    return {"memory": memory, "capture": made, "first-call": called, "compile": made + called}
