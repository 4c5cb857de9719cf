"""accelerate and Trainer take adapted models: FSDP2 as accelerate calls it, and Trainer in two processes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

import lora_lite_fx as llfx
from lora_lite_fx.graph.sharded import whole
from tests.distributed.training import Case, batch, in_one_process, make
from tests.support.conformance import close, randomise
from tests.support.models import tiny_llama
from tests.support.ranks import on_ranks

pytest.importorskip("accelerate")
ADAPTED = Case(llfx.LoRA(r=2), "adapt")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"cpu_ram_efficient_loading": False},
    "loaded by process 0": {"cpu_ram_efficient_loading": True},  # by way of the device "meta"
}


def prepared(model: Any, mixed_precision: str = "no", **config: Any) -> Any:
    """Return a model as `Accelerator.prepare` shards it, which does so on accelerators of hardware alone."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **config,
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    return fsdp2_prepare_model(
        SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=mixed_precision,
            device=torch.device("cpu"),
            is_main_process=dist.get_rank() == 0,
        ),
        model,
    )


def gradients_by_config(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        model = prepared(make(ADAPTED), **config)
        found[f"{name}, sharded"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        model(**batch(ADAPTED, 0, rank)).loss.backward()
        named = model.named_parameters()
        found[name] = {key: whole(p.grad).clone() for key, p in named if p.grad is not None}
    try:
        prepared(make(Case(ADAPTED.cfg, "adapt", base="bfloat16")), "bf16", cpu_ram_efficient_loading=False)(
            **batch(ADAPTED, 0, rank)
        )
        found["bf16"] = ""
    except llfx.CallError as error:
        found["bf16"] = str(error)
    return found


@pytest.mark.slow
def test_a_model_that_accelerate_shards_has_the_gradients_of_one_process() -> None:
    expected = in_one_process(ADAPTED, 2)["gradients"]
    for found in on_ranks(gradients_by_config, 2):
        for name in CONFIGS:
            assert found[f"{name}, sharded"]
            assert found[name].keys() == expected.keys()
            for tensor, gradient in found[name].items():
                close(gradient, expected[tensor], 1e-9, tensor)
        assert "model.to(torch.bfloat16), and shard it without param_dtype" in found["bf16"]


class _Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(40, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train(rank: int, folder: Path, processes: int, resume: bool) -> list[float]:
    """Train by `Trainer`, four steps of four texts; return the losses."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=2, vocab_size=40))
    model = llfx.adapt(base, llfx.LoRA(r=2))
    randomise(model, 1)
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4 // processes,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Texts())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_trainer_in_two_processes_has_the_losses_of_one_and_resumes_in_another_number(tmp_path: Path) -> None:
    (alone,) = on_ranks(train, 1, tmp_path / "one", 1, False)
    for losses in on_ranks(train, 2, tmp_path / "two", 2, False):
        if losses:
            assert losses == pytest.approx(alone, abs=2e-4)
    (resumed,) = on_ranks(train, 1, tmp_path / "two", 1, True)
    assert resumed == pytest.approx(alone, abs=2e-4)
