"""accelerate and Trainer take adapted models: FSDP2 as accelerate calls it; Trainer in two processes, by FSDP2 too."""

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
from tests.distributed.training import BANK, Case, batch, in_one_process, make
from tests.support.conformance import close, randomise
from tests.support.models import tiny_llama
from tests.support.ranks import on_ranks

pytest.importorskip("accelerate")
ADAPTED = Case(llfx.LoRA(r=2), "adapt")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"cpu_ram_efficient_loading": False},
    "loaded by process 0": {"cpu_ram_efficient_loading": True},  # by way of the device "meta"
}


OTHERS = {"a bank": Case(BANK, "adapt"), "int8": Case(llfx.LoRA(r=2), "adapt", base="int8")}


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
    for name, case in OTHERS.items():
        model = prepared(make(case), cpu_ram_efficient_loading=False)
        model(**batch(case, 0, rank)).loss.backward()
        found[name] = {key: whole(p.grad).clone() for key, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="fully_shard doesn't support scalar parameters"):  # as `shard` does
        prepared(make(Case(ADAPTED.cfg, "adapt", base="nf4")), cpu_ram_efficient_loading=False)
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
    others = {name: in_one_process(case, 2)["gradients"] for name, case in OTHERS.items()}
    for found in on_ranks(gradients_by_config, 2):
        for name in CONFIGS:
            assert found[f"{name}, sharded"]
            assert found[name].keys() == expected.keys()
            for tensor, gradient in found[name].items():
                close(gradient, expected[tensor], 1e-9, tensor)
        for name, gradients in others.items():
            assert found[name].keys() == gradients.keys()
            for tensor, gradient in found[name].items():
                close(gradient, gradients[tensor], 1e-5, f"{name}: {tensor}")
        assert "model.to(torch.bfloat16), and shard it without param_dtype" in found["bf16"]


class _Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(40, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def answer_as_on_gpus() -> None:
    """Let accelerate take its FSDP2 on CPUs, in this process.

    Its one check of devices stands in `AcceleratorState`, which sets the kind of a run to FSDP only for processes with
    GPUs or their like. What follows (`Accelerator.prepare`, saving, loading) goes by that kind alone.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin: Any = AcceleratorState.__init__

    def begin_as_on_gpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            assert self.distributed_type is DistributedType.MULTI_CPU  # or accelerate does it itself now
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    setattr(AcceleratorState, "__init__", begin_as_on_gpus)  # noqa: B010  # a type checker forbids the assignment


def _base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=2, vocab_size=40))


def train(rank: int, folder: Path, processes: int, resume: bool, fsdp: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train by `Trainer`, four steps of four texts; return the losses and the adapters.

    Args:
        folder: for checkpoints, after two steps and after four.
        processes: their number.
        resume: whether to go on from the checkpoint after two steps.
        fsdp: the configuration of FSDP2; None for DistributedDataParallel.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    sharded: dict[str, Any] = {}
    if fsdp is not None:
        answer_as_on_gpus()
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        sharded = {"fsdp": True, "fsdp_config": {"version": 2, **wrap, **fsdp}}
    model = llfx.adapt(_base(), llfx.LoRA(r=2))
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
        **sharded,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Texts())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "adapters": {name: whole(tensor).detach().clone() for name, tensor in llfx.adapter_state_dict(model).items()},
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "kind": str(trainer.accelerator.distributed_type),
    }


@pytest.mark.slow
def test_a_trainer_in_two_processes_has_the_losses_of_one_and_resumes_in_another_number(tmp_path: Path) -> None:
    (alone,) = on_ranks(train, 1, tmp_path / "one", 1, False)
    for found in on_ranks(train, 2, tmp_path / "two", 2, False):
        if found["losses"]:
            assert found["losses"] == pytest.approx(alone["losses"], abs=2e-4)
    (resumed,) = on_ranks(train, 1, tmp_path / "two", 1, True)
    assert resumed["losses"] == pytest.approx(alone["losses"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_trainer_with_fsdp2_trains_saves_and_resumes_like_one_process(state: str, tmp_path: Path) -> None:
    (alone,) = on_ranks(train, 1, tmp_path / "one", 1, False)
    fsdp = {"state_dict_type": state}
    for resume in (False, True):
        for found in on_ranks(train, 2, tmp_path / "two", 2, resume, fsdp):
            assert found["kind"] == "DistributedType.FSDP"
            assert found["sharded"]
            assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            for name, tensor in found["adapters"].items():
                close(tensor, alone["adapters"][name], 1e-3, name)  # Adam divides rounding by rounding
    if state == "FULL_STATE_DICT":  # the other one is torch.distributed.checkpoint's
        read = llfx.adapt(_base(), tmp_path / "two" / "checkpoint-4")
        for name, tensor in llfx.adapter_state_dict(read).items():
            assert torch.equal(tensor, found["adapters"][name]), name


def wrap_layers(rank: int, folder: Path) -> str:
    with pytest.raises(llfx.AdapterError) as caught:
        train(rank, folder, 2, False, {"activation_checkpointing": True})
    return str(caught.value)


@pytest.mark.slow
def test_layers_that_accelerate_wraps_to_checkpoint_them_are_refused(tmp_path: Path) -> None:
    for message in on_ranks(wrap_layers, 2, tmp_path):
        assert "model.gradient_checkpointing_enable()" in message
