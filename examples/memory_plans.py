"""Show what layers keep for the backward pass, and what it costs to keep less: memory against time.

    pip install -e ".[examples]"
    python examples/memory_plans.py                    # some minutes
    python examples/memory_plans.py --quick            # a small model: that it runs

Each line is a setting of `plan_memory`, and the last one is `checkpoint_layers=True`. The bytes are those that are
alive between the forward and the backward pass, of the layers alone: what stands around them is the same for all. The
steps are timed in turn, in one process: CPU time, as multiples of the step that keeps all.

The model has the form of Llama, random weights, and a LoRA with r=16 at each linear.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from live_bytes import LiveBytes

import lora_lite_fx as llfx

SETTINGS: dict[str, Any] = {"fast": "fast", "0.8": 0.8, "balanced": "balanced", "0.5": 0.5, "0.35": 0.35}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in each row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the lines here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    width, length, rounds = (64, 32, 2) if args.quick else (576, args.length, args.rounds)
    lines = list(measure(width, args.layers, (args.rows, length), rounds))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def measure(width: int, layers: int, shape: tuple[int, int], rounds: int) -> Any:
    """Yield the lines, and print them. `shape` is the rows of a step, and the tokens in each."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 192, 1),
        vocab_size=256,
    )
    model = transformers.LlamaForCausalLM(config)
    plain = llfx.rewrite(model, llfx.LoRA(r=16)).train()
    arms = {name: llfx.plan_memory(llfx.optimize(plain), memory) for name, memory in SETTINGS.items()}
    arms["checkpoint_layers"] = llfx.rewrite(plain, llfx.IA3(target_names=("lm_head",)), checkpoint_layers=True).train()
    ids = torch.randint(0, 256, shape)
    for gm in arms.values():
        step(gm, ids)
    around = alive(arms["fast"], ids) - layers_keep(llfx.plan_memory(llfx.optimize(plain), 1.0), ids)
    kept = {name: alive(gm, ids) - around for name, gm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, gm in arms.items():
            start = time.process_time()
            step(gm, ids)
            seconds[name].append(time.process_time() - start)
    rows, length = shape
    yield show(f"torch {torch.__version__}, 1 thread, d={width}, {layers} layers, {rows} x {length} tokens, LoRA r=16")
    yield show(f"{'memory':18} {'MiB kept':>9} {'part':>6} {'planned':>8} {'time':>6}")
    for name, gm in arms.items():
        said = f"{layers_keep(gm, ids) / 2**20:8.1f}" if name not in ("fast", "checkpoint_layers") else " " * 8
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["fast"], strict=True))
        part = kept[name] / kept["fast"]
        yield show(f"{name:18} {kept[name] / 2**20:9.1f} {part:6.2f} {said} {ratio:6.2f}")
    yield show(f"\n{llfx.memory_plan(arms['balanced'])[-1]}")


def step(gm: Any, ids: torch.Tensor) -> None:
    """Run a training step without an optimizer."""
    gm.zero_grad()
    gm(input_ids=ids, labels=ids).loss.backward()


def alive(gm: Any, ids: torch.Tensor) -> int:
    """Return the bytes that a forward pass leaves for the backward pass."""
    with LiveBytes() as live:
        loss = gm(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return int(live.count())


def layers_keep(gm: Any, ids: torch.Tensor) -> float:
    """Return the bytes that the layers keep, as the plans say."""
    step(gm, ids)
    return sum(plan.bytes_per_token * len(plan.layers) for plan in llfx.memory_plan(gm)) * ids.numel()


def show(line: str) -> str:
    """Print a line, and return it."""
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
