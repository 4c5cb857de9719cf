"""Train the stages of an adapted model in several processes, and the model in one."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import of_each
from tests.support.conformance import randomise
from tests.support.models import tiny_llama, tiny_t5

VOCABULARY = 40
STEPS = 3
ROWS, MICRO = 8, 4


@dataclass(frozen=True)
class Pipe:
    """A model to be trained in stages.

    Args:
        cfg: of its adapters.
        base: the name of one of `BASES`.
        schedule: of torch.
        stages: as for `split`.
        settings: of `llfx.capture`.
        copies: how many pipelines train on a part of each batch; their stages are sharded.
        compiled: whether layers are compiled.
        own_loss: whether the loss is that of the model.
    """

    cfg: llfx.Variant
    base: str = "llama"
    schedule: Any = ScheduleGPipe
    stages: Any = 2
    settings: dict[str, Any] = field(default_factory=dict)
    copies: int = 1
    compiled: bool = False
    own_loss: bool = False


def _llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_llama(num_hidden_layers=4, vocab_size=VOCABULARY, **changes)
    return transformers.LlamaForCausalLM(config).double()


def _gpt2() -> nn.Module:
    """Return a model whose head is tied to the embedding, which stand in different stages."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config).double()


def _t5() -> nn.Module:
    """Return a model whose last layers all read what the first ones have computed."""
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        tiny_t5(vocab_size=VOCABULARY, num_layers=2, num_decoder_layers=2, dropout_rate=0.0)
    ).double()


BASES = {"llama": _llama, "gpt2": _gpt2, "t5": _t5}


@functools.cache
def base_of(name: str) -> nn.Module:
    return BASES[name]()


@functools.cache
def graph_of(name: str) -> Any:
    ids = torch.ones(3, 7, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids.clone(), "decoder_input_ids": ids.clone()}
    return llfx.capture(base_of(name), inputs if name == "t5" else None)


def make(pipe: Pipe) -> Any:
    """Return the adapted model in training mode, with the same random adapters in each process."""
    gm = llfx.rewrite(llfx.capture(graph_of(pipe.base), **pipe.settings), pipe.cfg)
    randomise(gm, 1)
    return gm.train()


def batch(pipe: Pipe, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (ROWS, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pipe.base == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
    if pipe.cfg.slots:
        inputs["adapter_ids"] = torch.arange(ROWS) % 3
    if pipe.own_loss:
        inputs["labels"] = ids.clone()
    return inputs


def without(pipe: Pipe) -> tuple[str, ...]:
    """Return the arguments that the graph has and that calls leave out."""
    return tuple(name for name in graph_of(pipe.base).execution.signature.captured if name not in batch(pipe, 0))


def loss_of(results: Any, target: Tensor) -> Tensor:
    """Return the loss of what the last stage returns: logits, with others behind them; or the model's own loss."""
    logits: Tensor = results[0] if isinstance(results, tuple) else results
    if logits.dim() == 0:
        return logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


def on_rank(rank: int, pipe: Pipe) -> dict[str, Any]:
    """Train the stages of this process; return the losses of the last stage, and gradients and adapters of its own."""
    processes = dist.get_world_size() // pipe.copies
    mesh = init_device_mesh("cpu", (pipe.copies, processes), mesh_dim_names=("copy", "stage"))
    place, copy = mesh["stage"].get_local_rank(), mesh["copy"].get_local_rank()
    parts = llfx.split(make(pipe), pipe.stages, without=without(pipe))
    own = {index: part for index, part in enumerate(parts) if index % processes == place}
    if pipe.copies > 1:
        for part in own.values():
            llfx.shard(part, mesh["copy"])
    if pipe.compiled:
        for part in own.values():
            llfx.compile_layers(part, backend="aot_eager")
    group = mesh["stage"].get_group()
    device = torch.device("cpu")
    stages: Any = [PipelineStage(part, index, len(parts), device, group=group) for index, part in own.items()]
    micro = MICRO // pipe.copies
    many = issubclass(pipe.schedule, (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble))
    schedule = pipe.schedule(stages if many else stages[0], micro, loss_fn=loss_of)
    optimizer = optimizer_of([parameter for part in own.values() for parameter in llfx.adapter_parameters(part)])
    found: dict[str, Any] = {"losses": [], "gradients": {}, "after": {}}
    is_last = len(parts) - 1 in own
    for step in range(STEPS):
        inputs = {name: tensor.chunk(pipe.copies)[copy] for name, tensor in batch(pipe, step).items()}
        losses: list[Tensor] = []
        target = {"target": inputs["input_ids"], "losses": losses} if is_last else {}
        schedule.step(**inputs, **target, return_outputs=not pipe.own_loss)
        if is_last:
            found["losses"].append(torch.stack(losses).mean().item())
        if step == 0:
            for part in own.values():
                found["gradients"] |= {
                    name: whole(parameter.grad).clone()
                    for name, parameter in part.named_parameters()
                    if parameter.grad is not None
                }
        optimizer.step()
        optimizer.zero_grad()
    for part in own.values():
        found["after"] |= {name: whole(t).clone() for name, t in llfx.adapter_state_dict(part).items()}
    return found


def in_one_process(pipe: Pipe) -> dict[str, Any]:
    """Train the eager wrapper on the same microbatches; return the same."""
    wrapper = llfx.wrap(graph_of(pipe.base), pipe.cfg)
    randomise(wrapper, 1)
    wrapper.train()
    optimizer = optimizer_of(llfx.adapter_parameters(wrapper))
    found: dict[str, Any] = {"losses": [], "gradients": {}}
    for step in range(STEPS):
        losses = []
        inputs = batch(pipe, step)
        for index in range(MICRO):
            part = {name: tensor.chunk(MICRO)[index] for name, tensor in inputs.items()}
            ids = part.pop("adapter_ids", None)
            with llfx.by_row(wrapper, ids) if ids is not None else contextlib.nullcontext():
                results = wrapper(**part, use_cache=False)
            losses.append((results.loss if pipe.own_loss else loss_of(results.logits, part["input_ids"])) / MICRO)
            losses[-1].backward()
        found["losses"].append(sum(loss.item() for loss in losses))
        found["gradients"] = found["gradients"] or {
            name: parameter.grad.clone() for name, parameter in wrapper.named_parameters() if parameter.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    return {**found, "after": llfx.adapter_state_dict(wrapper)}


def train_all(rank: int, names: list[str]) -> dict[str, Any]:
    return of_each(names, lambda name: on_rank(rank, PIPES[name]))


PIPES = {
    "LoRA, GPipe": Pipe(llfx.LoRA(r=2)),
    "DoRA, checkpointed, 1F1B": Pipe(llfx.DoRA(r=2), schedule=Schedule1F1B, settings={"checkpoint_layers": True}),
    "LoRA, tied weights in two stages": Pipe(llfx.LoRA(r=2), "gpt2", stages=["transformer.h.1"]),
    "LoRA, values that all later layers read": Pipe(llfx.LoRA(r=2), "t5", Schedule1F1B),
    "LoRA, the loss of the model": Pipe(llfx.LoRA(r=2), own_loss=True),
    "VeRA, two stages in each process": Pipe(llfx.VeRA(r=4), schedule=ScheduleInterleaved1F1B, stages=4),
    "LoRA, backward in two parts": Pipe(llfx.LoRA(r=2), schedule=ScheduleInterleavedZeroBubble, stages=4),
    "LoRA, compiled layers": Pipe(llfx.LoRA(r=2), compiled=True),
    "a bank": Pipe(llfx.Bank(llfx.LoRA(r=2), slots=3)),
}
EVERYDAY = ("LoRA, GPipe", "DoRA, checkpointed, 1F1B")
FOUR = {"LoRA, two pipelines of sharded stages": Pipe(llfx.LoRA(r=2), schedule=Schedule1F1B, copies=2)}


def train_four(rank: int, names: list[str]) -> dict[str, Any]:
    return {name: on_rank(rank, FOUR[name]) for name in names}


def save_stages(rank: int, pipe: Pipe, folder: Path) -> str:
    """Write the adapters of all stages; return what a file of PEFT says."""
    part = llfx.split(make(pipe), pipe.stages, without=without(pipe))[rank]
    llfx.save(part, folder / "adapter.safetensors")
    with pytest.raises(llfx.CheckpointError, match="could not be written"):
        llfx.save(part, folder / "missing" / "file")
    with pytest.raises(llfx.AdapterError) as caught:
        llfx.save_peft(part, folder / "peft")
    return str(caught.value)
