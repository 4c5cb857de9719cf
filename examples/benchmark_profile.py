"""Show where a training step with adapters spends more than the frozen model's, by operator, beside PEFT.

    pip install -e ".[examples]" "peft>=0.20"
    python examples/benchmark_profile.py             # the steps that `docs/results.md` explains: four minutes
    python examples/benchmark_profile.py --quick     # one tiny step: that it runs

Each figure is the time that an operator of torch takes itself, without those that it calls, in milliseconds a step, as
`torch.profiler` counts it. The steps are those of `benchmark.py`, on one thread. The arms take turns, and each figure
is the least of the rounds. "the rest" is what the operators that are not printed take.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import benchmark_report as report
import torch
from benchmark import start_anew
from benchmark_arms import VARIANTS, Arm, Arms, capture, config
from benchmark_cases import CASES
from finetune_options import positive
from torch.profiler import ProfilerActivity, profile

STEPS = ("smollm2-6-body:OFT", "smollm2-6-body:LoRA", "gpt2:LoRA", "bert:LoRA")
ARMS = ("base", "peft", "ours")
_OF_AUTOGRAD = "autograd::engine::evaluate_function: "
"""What the profiler writes before the name of a function, for the time around it."""


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    lines = [report.table(report.circumstances({}, "cpu"), [])]  # the machine and the versions
    for step in args.steps:
        case, _, variant = step.partition(":")
        lines += ["", *table(f"{case}, train, {variant}", profiles(case, variant, args.rounds), args.rows)]
        print("\n".join(lines[-args.rows - 4 :]), file=sys.stderr, flush=True)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", nargs="+", type=step_name, default=STEPS, metavar="CASE:VARIANT", help="as of benchmark.py")
    add("--rounds", type=positive, default=9, help="in which each arm is profiled (default: %(default)s)")
    add("--rows", type=positive, default=8, help="operators to print (default: %(default)s)")
    add("--quick", action="store_true", help="one tiny step, one round")
    add("--out", type=Path, help="a file to write, too")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = ("tiny:LoRA",), 1
    return args


def step_name(text: str) -> str:
    """Return the name of a step, a case and a variant with a colon between; argparse prints what is wrong with it."""
    case, _, variant = text.partition(":")
    if case not in CASES or variant not in VARIANTS:
        known = f"the cases are {', '.join(CASES)}, the variants {', '.join(VARIANTS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a case and a variant: {known}")
    return text


def profiles(case: str, variant: str, rounds: int) -> dict[str, Counter[str]]:
    """Return the milliseconds of each operator in a training step, by arm: the least of the rounds."""
    module = CASES[case].module("cpu", torch.float32)
    step = CASES[case].step(module, "train", "cpu", torch.float32)
    arms = Arms(step, capture(step)[0], config(variant, 16, CASES[case]))
    ready = {name: arms.make(name) for name in ARMS}
    for name, arm in ready.items():
        if wrong := arms.disagreement(arm):
            raise SystemExit(f"{name} disagrees: {wrong}")
    runs: dict[str, list[Counter[str]]] = {name: [] for name in ARMS}
    for _ in range(rounds):
        for name, arm in ready.items():
            runs[name].append(_profiled(arm))
    return {name: Counter({op: min(run[op] for run in found) for op in found[0]}) for name, found in runs.items()}


def _profiled(arm: Arm) -> Counter[str]:
    arm.renew()
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        arm()
    return Counter({event.key: event.self_cpu_time_total / 1000 for event in taken.key_averages()})


def table(title: str, found: dict[str, Counter[str]], rows: int) -> list[str]:
    """Return the lines of a table: the operators in which the arms differ most from the base, and the sums."""
    operators = {op for each in found.values() for op in each}
    extra = {op: max(abs(each[op] - found["base"][op]) for each in found.values()) for op in operators}
    shown = sorted(extra, key=lambda op: (-extra[op], op))[:rows]
    all_of_them = [sum(each.values()) for each in found.values()]
    values = [(op.removeprefix(_OF_AUTOGRAD), [each[op] for each in found.values()]) for op in shown]
    printed = [sum(each[op] for op in shown) for each in found.values()]
    values.append(("the rest", [whole - part for whole, part in zip(all_of_them, printed, strict=True)]))
    values.append(("all", all_of_them))
    lines = [f"  {name:36.36}" + "".join(f"{value:10.1f}" for value in each) for name, each in values]
    return [f"{title:38}" + "".join(f"{name:>10}" for name in found) + "   ms a step", *lines]


if __name__ == "__main__":
    start_anew()
    torch.set_num_threads(1)
    main()
