"""Train adapted models in several processes and in one, and return what is to be equal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.support.conformance import randomise
from tests.support.models import tiny_albert, tiny_llama

VOCABULARY = 40
STEPS = 3
BANK = llfx.Bank(llfx.LoRA(r=2), slots=3)


@dataclass(frozen=True)
class Case:
    """A model to be trained in several processes.

    Args:
        cfg: of its adapters.
        front_end: makes it.
        base: the name of one of `BASES`.
        engine: divides the parameters, or copies them all. "parallel" is tensor parallelism: all processes get the
            batches of the first one.
        options: of the engine.
        settings: of `llfx.capture`, or of `adapt`.
        micro: the batches of a step in each process; all but the last are not synchronized.
        prepare: changes the adapted model before the engine gets it.
    """

    cfg: llfx.Variant
    front_end: Literal["rewrite", "adapt"] = "rewrite"
    base: str = "llama"
    engine: Literal["ddp", "shard", "parallel"] = "shard"
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    micro: int = 1
    prepare: Callable[[Any], object] = lambda model: None


def _llama(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY, **changes)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(dtype)


def _quantized(name: str) -> nn.Module:
    from tests.support.quantized import STORAGES  # after this process has begun, because torchao starts threads

    model = _llama(torch.float32, hidden_size=64, intermediate_size=64)  # blocks of 64 fit
    head, model.lm_head = model.lm_head, nn.Identity()
    STORAGES[name](model)
    model.lm_head = head
    return model


def _albert() -> nn.Module:
    """Return a model whose one layer runs three times."""
    torch.manual_seed(0)
    config = tiny_albert(0.0, vocab_size=VOCABULARY, classifier_dropout_prob=0.0)
    return transformers.AlbertForMaskedLM(config).double()


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Return a model whose weights are transposed, whose q, k and v are one, and whose norms are not in float32."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16)
    config.resid_pdrop, config.embd_pdrop, config.attn_pdrop = dropout, dropout, dropout
    return transformers.GPT2LMHeadModel(config).double()


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "tied": functools.partial(_llama, tie_word_embeddings=True),
    "bfloat16": functools.partial(_llama, torch.bfloat16),
    "albert": _albert,
    "gpt2": gpt2,
    "gpt2, dropout": functools.partial(gpt2, 0.2),
    "llama, dropout": functools.partial(_llama, attention_dropout=0.2),
    "nf4": functools.partial(_quantized, "nf4 twice"),
    "int8": functools.partial(_quantized, "int8"),
    "torchao int8": functools.partial(_quantized, "torchao int8"),
}


QUANTIZED = ("nf4", "int8", "torchao int8")


@functools.cache
def base_of(name: str) -> nn.Module:
    return BASES[name]()


@functools.cache
def graph_of(name: str) -> Any:
    return llfx.capture(base_of(name))


def make(case: Case) -> Any:
    """Return the adapted model in training mode, with the same random adapters in each process."""
    base = base_of(case.base)
    if case.front_end == "adapt":
        model = llfx.adapt(base, case.cfg, **case.settings)
    else:
        model = llfx.rewrite(llfx.capture(graph_of(case.base), **case.settings), case.cfg)
    randomise(model, 1)
    case.prepare(model)
    return model.train()


def batch(case: Case, step: int, process: int, micro: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * step + 10 * process + micro)
    ids = torch.randint(VOCABULARY, (2, 7), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return inputs | ({"adapter_ids": torch.tensor([process % 2, 2])} if case.cfg.slots else {})


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    # With a large eps, because gradients that are zero but for rounding would be divided by themselves.
    return torch.optim.AdamW(llfx.adapter_parameters(model), lr=0.01, eps=1e-3)


def on_rank(rank: int, case: Case) -> dict[str, Any]:
    """Train in this process and the others; return losses, the first gradients and the last adapters, all whole."""
    model = make(case)
    engines: dict[str, Any] = {"ddp": DistributedDataParallel, "shard": llfx.shard, "parallel": llfx.parallelize}
    engine = engines[case.engine](model, **case.options)
    optimizer = optimizer_of(model)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    torch.manual_seed(rank)  # other processes follow the first one
    for step in range(STEPS):
        for micro in range(case.micro):
            waits = case.engine == "ddp" and micro < case.micro - 1
            with engine.no_sync() if waits else contextlib.nullcontext():
                process = 0 if case.engine == "parallel" else rank
                loss = engine(**batch(case, step, process, micro)).loss / case.micro
                loss.backward()
            losses.append(loss.item())
        gradients = gradients or {
            name: whole(parameter.grad).clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    after = {name: whole(tensor).clone() for name, tensor in llfx.adapter_state_dict(model).items()}
    return {"losses": losses, "gradients": gradients, "after": after}


def in_one_process(case: Case, processes: int) -> dict[str, Any]:
    """Train on the batches of all processes; return the same.

    The eager wrapper is trained; on a quantized base, which is float32, the model itself: it equals the wrapper but for
    rounding, which some steps of training make as large as an error.
    """
    wrapper = make(case) if case.base in QUANTIZED else llfx.wrap(graph_of(case.base), case.cfg)
    randomise(wrapper, 1)
    wrapper.train()
    torch.manual_seed(0)
    optimizer = optimizer_of(wrapper)
    losses: list[list[float]] = [[] for _ in range(processes)]
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        for process in range(processes):
            for micro in range(case.micro):
                inputs = batch(case, step, process, micro)
                ids = inputs.pop("adapter_ids", None)
                with llfx.by_row(wrapper, ids) if ids is not None else contextlib.nullcontext():
                    loss = wrapper(**inputs).loss / case.micro
                (loss / processes).backward()
                losses[process].append(loss.item())
        gradients = gradients or {
            name: parameter.grad.clone() for name, parameter in wrapper.named_parameters() if parameter.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "after": llfx.adapter_state_dict(wrapper)}


def train_all(rank: int, names: list[str]) -> dict[str, Any]:
    return of_each(names, lambda name: on_rank(rank, CASES[name]))


def of_each(names: list[str], run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return the results of cases by name, and name the case in an error, because other processes see that alone."""
    found = {}
    for name in names:
        try:
            found[name] = run(name)
        except Exception as error:
            error.add_note(f"in the case {name!r}")
            raise
    return found


_STATIC = {"static_graph": True}
CASES: dict[str, Case] = {
    # DistributedDataParallel.
    "ddp, LoRA, rewrite": Case(llfx.LoRA(r=2), engine="ddp", options={"find_unused_parameters": False}),
    "ddp, static graph, DoRA, rewrite": Case(llfx.DoRA(r=2), engine="ddp", options=_STATIC),
    "ddp, accumulation, LoRA, adapt": Case(llfx.LoRA(r=2), "adapt", engine="ddp", micro=2),
    "ddp, bank, rewrite": Case(BANK, engine="ddp"),
    "ddp, checkpointed, static graph, rewrite": Case(
        llfx.LoRA(r=2), engine="ddp", settings={"checkpoint_layers": True}, options=_STATIC
    ),
    "ddp, nf4, rewrite": Case(llfx.LoRA(r=2), base="nf4", engine="ddp"),
    "ddp, int8, rewrite": Case(llfx.LoRA(r=2), base="int8", engine="ddp"),
    "ddp, torchao int8, rewrite": Case(llfx.LoRA(r=2), base="torchao int8", engine="ddp"),
    "ddp, nf4, adapt": Case(llfx.LoRA(r=2), "adapt", base="nf4", engine="ddp"),
    "ddp, bank, adapt": Case(BANK, "adapt", engine="ddp"),
    "ddp, compiled layers, rewrite": Case(
        llfx.LoRA(r=2), engine="ddp", prepare=lambda model: llfx.compile_layers(model, backend="aot_eager")
    ),
    # fully_shard.
    "shard, LoRA, rewrite": Case(llfx.LoRA(r=2)),
    "shard, DoRA, rewrite": Case(llfx.DoRA(r=2)),
    "shard, checkpointed, DoRA, rewrite": Case(llfx.DoRA(r=2), settings={"checkpoint_layers": True}),
    "shard, LoRA, adapt": Case(llfx.LoRA(r=2), "adapt"),
    "shard, bank, rewrite": Case(BANK),
    "shard, nf4, rewrite": Case(llfx.LoRA(r=2), base="nf4"),
    "shard, planned memory, rewrite": Case(llfx.LoRA(r=2), prepare=lambda model: llfx.plan_memory(model, 0.6)),
    "shard, planned memory, adapt": Case(llfx.DoRA(r=2), "adapt", prepare=lambda model: llfx.plan_memory(model, 0.6)),
    "ddp, planned memory, rewrite": Case(
        llfx.LoRA(r=2), engine="ddp", prepare=lambda model: llfx.plan_memory(model, 0.6)
    ),
    "shard, tied, fused loss, rewrite": Case(llfx.LoRA(r=2), base="tied", settings={"fuse_loss": True}),
    "shard, accumulation, VeRA, rewrite": Case(llfx.VeRA(r=4), micro=2),
    "shard, int8, rewrite": Case(llfx.LoRA(r=2), base="int8"),
    "shard, torchao int8, rewrite": Case(llfx.LoRA(r=2), base="torchao int8"),
    "shard, nf4, adapt": Case(llfx.LoRA(r=2), "adapt", base="nf4"),
    "shard, bank, adapt": Case(BANK, "adapt"),
    "shard, HRA, rewrite": Case(llfx.HRA(r=2)),
    "shard, Full, rewrite": Case(llfx.Full(target_roles=("query", "head"))),
    "shard, bfloat16 base, rewrite": Case(
        llfx.LoRA(r=2), base="bfloat16", options={"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    ),
    "shard, offloaded, rewrite": Case(llfx.LoRA(r=2), options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "shard, a layer that runs three times, rewrite": Case(llfx.LoRA(r=2), base="albert"),
    "shard, not freed after the forward pass, rewrite": Case(llfx.LoRA(r=2), options={"reshard_after_forward": False}),
    "shard, compiled layers, DoRA, rewrite": Case(
        llfx.DoRA(r=2), prepare=lambda model: llfx.compile_layers(model, backend="aot_eager")
    ),
}
CASES |= {
    # Tensor parallelism.
    "parallel, LoRA, transposed": Case(llfx.LoRA(r=2), base="gpt2", engine="parallel"),
    "parallel, LoRA": Case(llfx.LoRA(r=2), engine="parallel"),
    "parallel, accumulation, DoRA, checkpointed": Case(
        llfx.DoRA(r=2), base="gpt2", engine="parallel", micro=2, settings={"checkpoint_layers": True}
    ),
    "parallel, fused loss": Case(llfx.LoRA(r=2), engine="parallel", settings={"fuse_loss": True}),
    "parallel, PiSSA": Case(llfx.PiSSA(r=2), base="gpt2", engine="parallel"),
    "parallel, HRA": Case(llfx.HRA(r=2), base="gpt2", engine="parallel"),
    "parallel, VeRA": Case(llfx.VeRA(r=4), base="gpt2", engine="parallel"),
    "parallel, OFT": Case(llfx.OFT(block_size=4), base="gpt2", engine="parallel"),
    "parallel, RoAd": Case(llfx.RoAd(group_size=4), base="gpt2", engine="parallel"),
    "parallel, IA3": Case(llfx.IA3(), base="gpt2", engine="parallel"),
    "parallel, DeLoRA": Case(llfx.DeLoRA(r=2), base="gpt2", engine="parallel"),
    "parallel, bank": Case(BANK, base="gpt2", engine="parallel"),
    "parallel, Full": Case(llfx.Full(target_roles=("query", "head")), engine="parallel"),
    "parallel, other roles": Case(
        llfx.LoRA(r=2), engine="parallel", options={"columns": ("down", "head"), "rows": ("gate", "query")}
    ),
    "parallel, tied": Case(llfx.LoRA(r=2), base="tied", engine="parallel", options={"columns": ("head", "up")}),
    "parallel, bfloat16 base": Case(llfx.LoRA(r=2), base="bfloat16", engine="parallel"),
    "parallel, dropout": Case(llfx.LoRA(r=2, dropout=0.3), engine="parallel", base="gpt2, dropout", micro=2),
    "parallel, dropout, grouped heads": Case(llfx.LoRA(r=2, dropout=0.3), engine="parallel", base="llama, dropout"),
    "parallel, dropout, checkpointed": Case(
        llfx.DoRA(r=2, dropout=0.3), engine="parallel", base="gpt2, dropout", settings={"checkpoint_layers": True}
    ),
    "parallel, dropout, LoHa": Case(
        llfx.LoHa(r=2, rank_dropout=0.4, module_dropout=0.2), engine="parallel", base="gpt2, dropout"
    ),
    "parallel, LoRA, adapt": Case(llfx.LoRA(r=2), "adapt", base="gpt2", engine="parallel"),
    "parallel, dropout, accumulation, DoRA, adapt": Case(
        llfx.DoRA(r=2, dropout=0.3), "adapt", base="gpt2, dropout", engine="parallel", micro=2
    ),
    "parallel, bank, adapt": Case(BANK, "adapt", engine="parallel"),
    "parallel, a layer that runs three times": Case(llfx.LoRA(r=2), base="albert", engine="parallel"),
}
EVERYDAY = (
    "parallel, LoRA, transposed",
    "ddp, static graph, DoRA, rewrite",
    "shard, checkpointed, DoRA, rewrite",
)
"""The cases of the everyday run. `tests/execution/test_layers.py` shards an adapted model in one process."""
BROAD = ("ddp, bank, rewrite", "shard, bank, rewrite")
