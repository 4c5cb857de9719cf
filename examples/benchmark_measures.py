"""The measures of `benchmark.py`: times, counts and peaks of arms."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_arms import Arm, Arms
from counted_bytes import kept_bytes
from live_bytes import LiveBytes
from torch import Tensor, nn
from variants import flop_counter

SHAPES = ((2, 16), (3, 24), (5, 40), (8, 3), (1, 32))
"""The batches and lengths for which recompilations are counted."""
SLOW, SELDOM = 4, 4
"""An arm that takes SLOW times as long as the base takes part in one of SELDOM rounds."""
FEWEST_ROUNDS = 3
"""When the time is over."""

# Times.


def time_rounds(
    arms: list[Arm], rounds: int, least: float, device: str, ends: float = math.inf
) -> dict[str, list[float | None]]:
    """Return the seconds per call of each arm in each round, None if it took no part.

    Args:
        arms: the first one is the base.
        rounds: how many, if they are not over at `ends`, by `time.monotonic`.
        least: the seconds of a turn.
        device: of the arms.
    """
    turn = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = {arm.name: min(_calls(arm, 1, turn), _calls(arm, 1, turn)) for arm in arms}
    counts = {name: min(10_000, max(1, math.ceil(least / seconds))) for name, seconds in once.items()}
    seldom = {name for name, seconds in once.items() if seconds > SLOW * once["base"]}
    times: dict[str, list[float | None]] = {arm.name: [] for arm in arms}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > ends:
                break
            # Change the order each time, because an arm finds in the caches what the arm before it left there.
            for arm in random.Random(number).sample(arms, len(arms)):
                left_out = arm.name in seldom and number % SELDOM
                times[arm.name].append(None if left_out else _calls(arm, counts[arm.name], turn))
            gc.collect(0)
    finally:
        gc.enable()
    return times


def _calls(arm: Arm, count: int, seconds_of: Callable[[Callable[[], Any]], float]) -> float:
    """Return the mean seconds of `count` calls."""
    if arm.step.trains:  # do not time the work between the steps

        def step() -> float:
            arm.renew()
            return seconds_of(arm)

        return sum(step() for _ in range(count)) / count

    def calls() -> None:
        for _ in range(count):
            arm()

    with torch.no_grad():
        if count > 1:
            arm()  # fill the caches, which the arm before has used
        return seconds_of(calls) / count


def _cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _cuda_seconds(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


# Counts.


def flops(arm: Arm) -> int:
    """Count the multiplications and additions of one step, without what an arm keeps from call to call."""
    arm.renew()
    with flop_counter() as counter, torch.set_grad_enabled(arm.step.trains):
        arm()
    arm.renew()
    return int(counter.get_total_flops())


def saved(arm: Arm) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, without parameters and buffers."""
    modules = [module for module in (arm.step.module, arm.run) if isinstance(module, nn.Module)]
    if arm.name == "ours-balanced":  # hooks around a layer do not see what it keeps
        given = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        with LiveBytes() as live:
            outputs = arm.run(**arm.step.inputs)
            return int(live.count(besides=[*given, *arm.parameters.values(), outputs]))
    arm.renew()
    kept, _ = kept_bytes(lambda: arm.run(**arm.step.inputs), modules, arm.parameters.values())
    return kept


def gradient_error(arm: Arm, exact: dict[str, Tensor]) -> float:
    """Return how far an arm's gradients are from exact ones, as a multiple of the norm of those."""
    actual = arm.results()
    squares = {name: (actual[name].double() - gradient).square().sum().item() for name, gradient in exact.items()}
    return math.sqrt(sum(squares.values()) / sum(gradient.square().sum().item() for gradient in exact.values()))


def compilations(arms: Arms, name: str) -> list[int]:
    """Return how many graphs of an arm are compiled for each shape of SHAPES, in that order."""
    counts: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        counts[-1] += 1
        return gm.forward

    torch.compiler.reset()
    run = arms.compile(arms.make(name), dynamic=True, backend=backend)
    (argument, example), *_ = arms.step.example.items()
    for batch, length in SHAPES:
        counts.append(0)
        with torch.no_grad():
            run(**{argument: example[:1, :1].repeat(batch, length, *[1] * (example.dim() - 2))})
    return counts


# Peaks.


def peak(arm: Arm, device: str) -> int:
    """Return the peak of a training step, not the first one, in bytes above those in use before."""
    arm.renew()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    arm()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def wait(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
