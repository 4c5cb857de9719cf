"""Check what must hold before a change lands: `bash .ci/run`, and `bash .ci/run quick` before a branch moves.

A landing is judged by releases that were tried: all installs but the main job's read `tests/constraints.txt`. What came
out since is asked by `bash .ci/run newest`, which is an alarm and no part of a landing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from readme_command import README, readme_command

TEXT = README.read_text(encoding="utf-8")
MAIN_JOB = readme_command("main-job", TEXT)
INSTALLS, TESTS = readme_command("tests", TEXT).rsplit(" && ", 1)
VENV = "python3 -m venv $WORK"
BOUNDS = "-c tests/constraints.txt"
NO_DOWNLOAD = re.compile("Connection|timed out|Timeout|Max retries|IncompleteRead|Temporary failure")
PASSED, NOT_TRIED = "passed", "not tried, because a download did not come"
TIMES_IDLE = 3
"""A step is cut off after this many times what it takes on idle cores, because a hung step may not hide the others."""


@dataclass(frozen=True)
class Step:
    """Commands of bash, and the seconds that they take on two idle cores.

    `environment` is a folder of `$WORK` that this step or one before it makes; None is the environment that is active.
    `downloads` runs first. Where a download does not come, the step says so, tries nothing, and does not fail.
    """

    name: str
    idle: int
    commands: tuple[str, ...]
    environment: str | None = "tests"
    downloads: str | None = None

    @property
    def limit(self) -> int:
        return TIMES_IDLE * self.idle


STYLE = Step("format, lint, types", 60, ("ruff format --check .", "ruff check .", "mypy"))
EVERYDAY = Step("everyday tests", 500, (TESTS,))
BROAD = Step("broad tests", 1030, (f"{TESTS} -m 'broad and not slow'",))
VERSIONS = "python -m pip freeze --exclude-editable | grep -E '^(torch|transformers|peft|mypy|ruff)='"
RUNTIMES = (
    "tests/hand_over/test_onnx*.py tests/hand_over/test_executorch*.py tests/hand_over/test_gguf*.py"
    " tests/formats/peft/test_openvino_genai.py tests/hand_over/test_export_command.py tests/project/test_serve.py"
)
LIBRARIES = "tests/formats/test_diffusers.py tests/hugging_face/test_clients.py tests/survey"
CORE = (
    "tests/test_smoke.py tests/compat tests/devices tests/graph tests/ops tests/passes tests/capture tests/execution"
    " tests/torch_compile"
)


OLDEST = Step(
    "oldest releases",
    180,
    (VERSIONS, f"{TESTS} -m smoke"),
    "oldest",
    f"{VENV}/oldest; pip install -e '.[test,examples]' {BOUNDS} 'torch==2.12.*' 'transformers==5.12.*' 'peft==0.20.*'",
)
LANDING = (
    Step("installs of the README's test command", 110, (f"{VENV}/tests", INSTALLS)),
    STYLE,
    Step(
        "site of docs/ with the API reference, with warnings as errors",
        30,
        (
            'python -m mkdocs build --quiet --strict --site-dir "$WORK/site"',
            'for page in index reference/{rewriting,passes,testing}; do test -s "$WORK/site/$page.html"; done',
        ),
    ),
    EVERYDAY,
    BROAD,
    # llama.cpp is compiled by its install, which not every machine can.
    Step(
        "runtimes that adapters are handed to, and models of diffusers and timm",
        270,
        (f"{TESTS} {RUNTIMES} {LIBRARIES}",),
        downloads=f"pip install -e '.[runtimes]' diffusers timm {BOUNDS}",
    ),
    Step(
        "benchmark, tiny cases",
        60,
        (
            'MPLBACKEND=Agg python examples/benchmark.py --quick --out "$WORK/benchmark"',
            'for end in json png; do test -s "$WORK/benchmark.$end"; done',
        ),
    ),
)
BESIDE_LANDING = (
    Step(
        "README's main job, a few steps",
        300,
        (
            f"{VENV}/main-job",
            f'{MAIN_JOB} --steps 3 --out "$WORK/out"',
            'for file in adapter.safetensors model.pt2 loss.png; do test -s "$WORK/out/$file"; done',
            'rm -rf "$WORK/main-job"',  # because it takes gigabytes where torch comes with CUDA
        ),
        "main-job",
    ),
    OLDEST,
)
"""Steps that are installs for the most part, and leave a second core to those of `LANDING`."""

# An empty file of constraints lifts those of the machine, so that no limit of it keeps a release away.
_FREE = 'export PIP_CONSTRAINT="$WORK/no-constraints"; : >"$PIP_CONSTRAINT"'
_NEWEST = (
    Step(
        "installs of the newest releases",
        400,
        (f"{VENV}/newest", f"{_FREE}; {INSTALLS.replace(f' {BOUNDS}', '')}", VERSIONS),
    ),
    STYLE,
    EVERYDAY,
    BROAD,
)
NEWEST = tuple(replace(step, environment="newest") for step in _NEWEST)
RAISE = Step("bounds of tests/constraints.txt", 5, ("python .ci/raise_bounds.py",), "newest")
NIGHTLY = Step(
    "nightly releases",
    600,
    (VERSIONS, f"{TESTS} {CORE}"),
    "nightly",
    f"{VENV}/nightly; {_FREE}; pip install -e '.[test,examples]' --upgrade --pre torch transformers peft",
)

CHECKS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "quick": (
        "format, lint, types and the README's tests, in the environment that is active",
        tuple(replace(step, environment=None) for step in (STYLE, EVERYDAY)),
    ),
    "newest": ("lint, types, everyday and broad tests with what is newest, without constraints", NEWEST),
    "raise": (
        "newest; where it passes, tests/constraints.txt takes the releases that it was passed with",
        (*NEWEST, RAISE),
    ),
    "oldest": ("smoke tests with the oldest releases", (OLDEST,)),
    "nightly": ("everyday tests of the core with pre-releases", (NIGHTLY,)),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a step: `passed`, `not tried`, or why it failed."""

    step: Step
    said: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.said not in (PASSED, NOT_TRIED)


class Runner:
    """Runs steps in environments below `work`, and keeps their outcomes."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.outcomes: list[Outcome] = []
        self._running: set[int] = set()

    def run(self, step: Step, checkout: Path, log: IO[str] | None = None) -> Outcome:
        """Run a step in `checkout`; it prints to `log`, or to the output of this process."""
        begun = time.monotonic()
        call = _Call(checkout, self._variables(step), begun + step.limit, log)
        said = self._download(step, call)
        for command in step.commands:
            if said != PASSED:
                break
            said = self._command(command, call)
        outcome = Outcome(step, said, time.monotonic() - begun)
        self.outcomes.append(outcome)
        if said != PASSED:
            print(f"\n== {step.name}: {said} (limit {step.limit} s, idle {step.idle} s)", file=log, flush=True)
        return outcome

    def stop(self) -> None:
        """End what is still running."""
        for group in tuple(self._running):
            _end(group, signal.SIGKILL)

    def _variables(self, step: Step) -> dict[str, str]:
        variables = {**os.environ, "WORK": str(self.work)}
        if step.environment is not None:
            variables.pop("PYTHONPATH", None)
            variables["PATH"] = f"{self.work / step.environment / 'bin'}{os.pathsep}{variables['PATH']}"
        return variables

    def _download(self, step: Step, call: _Call) -> str:
        if step.downloads is None:
            return PASSED
        with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
            said = self._command(step.downloads, replace(call, log=printed))
            printed.seek(0)
            text = printed.read()
        print(text, file=call.log, end="", flush=True)
        return NOT_TRIED if said != PASSED and NO_DOWNLOAD.search(text) else said

    def _command(self, command: str, call: _Call) -> str:
        print(f"+ {command}", file=call.log, flush=True)
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=call.checkout,
            env=call.variables,
            stdin=subprocess.DEVNULL,
            stdout=call.log,
            stderr=call.log and subprocess.STDOUT,
            start_new_session=True,  # so that it is ended with all that it has started
        )
        self._running.add(process.pid)
        try:
            code = process.wait(max(0.0, call.deadline - time.monotonic()))
            return PASSED if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            _end(process.pid, signal.SIGTERM)  # The tests say which of them were running.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            return "cut off"
        finally:
            _end(process.pid, signal.SIGKILL)
            process.wait()
            self._running.discard(process.pid)


@dataclass(frozen=True)
class _Call:
    """What the commands of one step share; `deadline` is a time of `time.monotonic`."""

    checkout: Path
    variables: dict[str, str]
    deadline: float
    log: IO[str] | None


def _end(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


class Beside(threading.Thread):
    """Runs steps beside others, in a copy of the checkout, because an install writes into its own."""

    def __init__(self, runner: Runner, steps: tuple[Step, ...]) -> None:
        super().__init__(daemon=True)
        self._runner, self._steps = runner, steps
        self._checkout = runner.work / "checkout"
        self._logs = {step.name: runner.work / f"beside-{number}.log" for number, step in enumerate(steps)}

    def run(self) -> None:
        shutil.copytree(".", self._checkout, symlinks=True)
        for step in self._steps:
            with self._logs[step.name].open("w", encoding="utf-8") as log:
                if self._runner.run(step, self._checkout, log).failed:
                    return

    def failed(self) -> bool:
        """Print the steps that are done since the last call, and return whether one of them failed."""
        done = [outcome for outcome in self._runner.outcomes if outcome.step.name in self._logs]
        for outcome in done:
            print(f"\n== {outcome.step.name}: what it printed", flush=True)
            print(self._logs.pop(outcome.step.name).read_text(encoding="utf-8"), end="", flush=True)
        return any(outcome.failed for outcome in done)


def check(steps: tuple[Step, ...], beside: tuple[Step, ...], work: Path) -> bool:
    """Run steps, and others beside them, until one fails; print their times, and return whether all passed."""
    begun = time.monotonic()
    runner = Runner(work)
    others = Beside(runner, beside)
    failed = False
    try:
        others.start()
        for step in steps:
            print(f"\n== {step.name} ({time.monotonic() - begun:.0f} s)", flush=True)
            failed = runner.run(step, Path()).failed | others.failed()
            if failed:
                break
        else:
            others.join()
            failed = others.failed()
    finally:
        runner.stop()
    print(f"\n== {'failed' if failed else 'done'} ({time.monotonic() - begun:.0f} s)\n  took   idle  limit  step")
    for each in runner.outcomes:
        print(f"{each.seconds:6.0f} {each.step.idle:6} {each.step.limit:6}  {each.step.name}: {each.said}")
    return not failed


def main(names: list[str]) -> int:
    """Run what is named, and return the exit status: 1 where a step failed, 2 for a name that is not known."""
    if names and (len(names) > 1 or names[0] not in CHECKS):
        known = [f"  bash .ci/run {name:8} {what}" for name, (what, _) in CHECKS.items()]
        print(f"{' '.join(names)!r} is not a check. There are:", file=sys.stderr)
        print("  bash .ci/run          all that a landing is judged by", *known, sep="\n", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended, too
    os.environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_QUIET="1", HF_HUB_OFFLINE="1")
    steps, beside = (CHECKS[names[0]][1], ()) if names else (LANDING, BESIDE_LANDING)
    with tempfile.TemporaryDirectory() as work:
        return 0 if check(steps, beside, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
