"""The training of `finetune.py`: blocks of tokens, steps, checkpoints, interrupts, peak memory."""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import finetune_checkpoints as checkpoints
import torch
import torch.distributed as dist
from finetune_data import DataError, Example, encoded
from finetune_options import saved_options
from torch import Tensor, fx
from tqdm import tqdm

import lora_lite_fx as llfx

ADAPTER, STATE = "adapter.safetensors", "training.pt"
NOT_COUNTED = -100  # The label of a token that the loss does not count.


def to_blocks(tokenizer: Any, examples: Sequence[Example], length: int) -> Tensor:
    """Return the tokens of examples and their labels, `(2, n, length)`: n blocks, without the rest that fills none.

    Raises:
        DataError: there is not a block that has a token to count, or the examples cannot be encoded.
    """
    ids: list[int] = []
    labels: list[int] = []
    for example in tqdm(examples, desc="tokenizing", delay=2, leave=False):
        tokens, counts = encoded(tokenizer, example)
        ids += tokens
        labels += [token if count else NOT_COUNTED for token, count in zip(tokens, counts, strict=True)]
    if len(ids) < length:
        raise DataError(f"The text is too short: a part of it has {len(ids)} tokens, and --length is {length}.")
    size = len(ids) // length * length
    blocks = torch.tensor([ids[:size], labels[:size]]).view(2, -1, length)
    blocks = blocks[:, counted(blocks) > 0]
    if not blocks.numel():
        raise DataError("A part of the data has only prompts in its blocks, and no token of a completion.")
    return blocks


def counted(blocks: Tensor) -> Tensor:
    """Return how many tokens the loss counts in each block: the model shifts the labels, so the first counts never."""
    return (blocks[1, :, 1:] != NOT_COUNTED).sum(1)


def inputs(ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Return the graph's arguments for `ids (batch, length)`. The model shifts the labels itself."""
    # Make the labels a tensor of their own, because torch.export takes one tensor in two places for one input.
    labels = (ids if labels is None else labels).clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Training:
    """Trains the adapters of a graph: holds the optimizer, the schedule and the losses so far.

    Args:
        gm: the graph, which is trained in place.
        blocks: of the training data.
        args: the options of the command line.
        before: what was scored before, which a checkpoint keeps for the end of the run.
    """

    def __init__(self, gm: fx.GraphModule, blocks: Tensor, args: argparse.Namespace, before: dict[str, Any]) -> None:
        self.gm, self.blocks, self.args, self.before = gm.train(), blocks, args, before
        self.parameters = llfx.adapter_parameters(gm)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_cosine(step, args.steps))
        self.losses: list[float] = []
        # What is compiled shares its parameters with `gm`, so everything else keeps using `gm`.
        self.forward: Any = gm
        if args.compile:
            self.forward = llfx.compile_layers(gm) if args.shard else torch.compile(gm, fullgraph=True)
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if args.shard else (0, 1)

    def run(self) -> bool:
        """Train until the last step or Ctrl-C, and save every `save_every` steps; return whether Ctrl-C ended it."""
        args, begun = self.args, len(self.losses)
        order = islice(shuffled(self.blocks.shape[1], args.seed), begun * args.batch, None)
        bar = tqdm(total=args.steps, initial=begun, unit="step", desc="training", disable=self.rank > 0)
        interrupted, start = False, time.perf_counter()
        with interruptible() as interrupts, bar:
            while len(self.losses) < args.steps and not interrupted:
                interrupted = self.step([next(order) for _ in range(args.batch)], interrupts)
                done = len(self.losses)
                if done % args.save_every == 0 or done == args.steps or interrupted:
                    self.save()
                speed = (done - begun) * args.batch * args.length / (time.perf_counter() - start)
                bar.set_postfix({"loss": f"{self.losses[-1]:.3f}", "tokens/s": f"{speed:.0f}"}, refresh=False)
                bar.update()
        return interrupted

    def step(self, chosen: Sequence[int], interrupts: Sequence[int]) -> bool:
        """Train on the chosen blocks, of which each process has a part; return whether a process was interrupted."""
        part = self.blocks[:, chosen[self.rank :: self.processes]]
        # The loss is a mean over the tokens that count, of which processes may have more or less.
        share = counted(part).sum() * self.processes / counted(self.blocks[:, chosen]).sum()
        loss = self.forward(**inputs(*part)).loss * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        # The mean over processes; and whether one was interrupted, because all must stop after the same step.
        found = torch.stack([loss.detach().float(), loss.new_tensor(bool(interrupts)).float()]) / self.processes
        if self.args.shard:
            dist.all_reduce(found)
        self.losses.append(found[0].item())
        return found[1].item() > 0

    def save(self) -> None:
        """Save the adapter; and in one process a checkpoint, from which `--resume` goes on to the bit."""
        adapter = self.args.out / ADAPTER
        llfx.save(self.gm, adapter)
        if self.args.shard:
            return
        run = {
            "options": saved_options(self.args),
            "data": self.args.texts.digest,
            "device": self.args.on,
            "before": self.before,
            "losses": self.losses,
        }
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_states(),
        }
        with checkpoints.writing(self.args.out, len(self.losses), run) as folder:
            shutil.copyfile(adapter, folder / ADAPTER)
            torch.save(state, folder / STATE)

    def go_on(self, checkpoint: Path, losses: Sequence[float]) -> None:
        """Go on after a checkpoint, whose adapter `gm` has already."""
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_random_states(state["random"])
        self.losses = list(losses)


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's random generators, which a model with dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Give torch's random generators the states that `random_states` returned."""
    for device, state in states.items():
        torch.set_rng_state(state) if device == "cpu" else torch.get_device_module(device).set_rng_state(state)


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
