"""What all tests share."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

# The models are tiny: threads cost more than they gain, and the tests themselves run side by side.
torch.set_num_threads(1)
# They are captured once each: to keep what operators do to fake tensors costs half of a capture and is of no use again.
torch._dynamo.config.fake_tensor_cache_enabled = False

COMMANDS = {
    "everyday": "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder",
    "broad": "python -m pytest -n 2 --dist loadfile -m 'broad and not slow'",
    "slow": "python -m pytest -n 2 --dist loadfile -m slow",
}
"""What runs the tests of each tier; a test of two tiers belongs to the later one."""

PROJECT = Path(__file__).parent / "project"

_left_out: Counter[str] = Counter()
_running: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Let a run that SIGTERM cuts off say where it stood: workers print stacks, the first process names tests."""
    if hasattr(config, "workerinput"):
        # A copy of the descriptor, because pytest turns the standard one away while a test runs.
        faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)
    else:
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit(f"cut off while running {', '.join(_running)}", 143))


def pytest_runtest_logstart(nodeid: str) -> None:
    _running.add(nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    _running.discard(nodeid)


@pytest.hookimpl(tryfirst=True)
def _seed() -> None:
    """Seed torch, so that no test depends on what its process has drawn before."""
    torch.manual_seed(0)


# Before the values of a module are drawn, those of its fixtures, and those of the test itself.
pytest_collectstart = pytest_runtest_setup = pytest_runtest_call = _seed


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the weekly run all but every third of the broad parameters of a test, lest `.ci/run` take too long.

    What documents show is in `tests/project` and runs whole.
    """
    met: Counter[str] = Counter()
    for item in items:
        if tier(item) == "broad" and hasattr(item, "callspec") and PROJECT not in item.path.parents:
            test = item.nodeid.partition("[")[0]
            if met[test] % 3:
                item.add_marker(pytest.mark.slow)
            met[test] += 1


def pytest_collection_finish() -> None:
    # Half a million objects of imported modules stay for good: without them, collecting garbage takes half the time.
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)  # tests make few cycles, and look for them seldom


def tier(item: pytest.Item) -> str:
    """Return the tier that a test belongs to: the last in `COMMANDS` that it is marked with, else the first."""
    return next((name for name in ("slow", "broad") if item.get_closest_marker(name)), "everyday")


def pytest_deselected(items: Iterable[pytest.Item]) -> None:
    _left_out.update(map(tier, items))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Print what was left out and how it is run, below pytest's own last line."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # in a process of pytest-xdist, which hands it to the one that prints
        output["left_out"] = dict(_left_out)
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if output is None and reporter is not None and _left_out:
        parts = (f"{_left_out[name]} {name}: {COMMANDS[name]}" for name in COMMANDS if _left_out[name])
        reporter.write_line(f"Left out: {'; '.join(parts)}")
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has left out; each collects the same tests."""
    _left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - _left_out)
