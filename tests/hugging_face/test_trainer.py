"""Check an adapted model under transformers' Trainer: training, evaluation, checkpoints and resuming."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.execution.optimize import checkpoints_layers
from tests.support.conformance import close, randomise
from tests.support.models import tiny_llama
from tests.support.untouched import untouched

CONFIG = llfx.LoRA(r=2, dropout=0.2)
LLAMA = tiny_llama(attention_dropout=0.1)


def base() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(LLAMA)


def adapted() -> Any:
    torch.manual_seed(1)
    model = llfx.adapt(base(), CONFIG)
    randomise(model, 0)
    return model


@functools.cache
def shared() -> Any:
    """Return one adapted model, whose graphs all tests use; each test starts from the same adapters."""
    return adapted()


def fresh() -> Any:
    """Return `shared()` with the adapter values that `adapted()` gave it."""
    randomise(shared(), 0)
    return shared()


def texts(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(99, (6,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    """Return a Trainer of `model` on the CPU, with these training arguments."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    args = hf.TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return hf.Trainer(model=model, args=args, train_dataset=texts(20), eval_dataset=texts(4))


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(model).items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


class StopAfter(hf.TrainerCallback):
    """A callback that stops the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


@pytest.mark.broad
def test_a_run_that_is_interrupted_and_resumed_gives_the_same_adapters_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fresh()
    start = state(whole)
    trainer(whole, tmp_path / "whole").train()
    expected = state(whole)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in expected.items())

    first = trainer(fresh(), tmp_path / "part", save_strategy="steps", save_steps=2)
    first.add_callback(StopAfter(4))
    first.train()
    assert first.state.global_step == 4

    resumed = adapted()
    with caplog.at_level("WARNING"):
        trainer(resumed, tmp_path / "part").train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert not [record.message for record in caplog.records if "keys" in record.message]
    assert_same(state(resumed), expected)


@pytest.mark.broad
def test_checkpoints_hold_the_adapters_only_and_can_be_adapted_with(tmp_path: Path) -> None:
    model = fresh()
    trainer(model, tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert saved.keys() == llfx.adapter_state_dict(model).keys()
    assert {file.name for file in checkpoint.glob("*model*")} == {"model.safetensors", "adapter_model.safetensors"}
    assert_same(state(llfx.adapt(base(), checkpoint)), state(model))


@pytest.mark.broad
def test_only_the_adapters_move_and_the_users_model_stays_as_it_was(tmp_path: Path) -> None:
    model = base()
    with untouched(model):
        adapted_model = llfx.adapt(model, CONFIG)
        before = {name: tensor.clone() for name, tensor in adapted_model.state_dict().items()}
        trainer(adapted_model, tmp_path, max_steps=3, learning_rate=1e-1).train()
    trained = {name for name, tensor in adapted_model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trained == llfx.adapter_state_dict(adapted_model).keys()


@pytest.mark.broad
def test_evaluation_gives_the_loss_of_the_eager_wrapper(tmp_path: Path) -> None:
    wrapped = llfx.wrap(base(), CONFIG)
    llfx.load_adapter_state_dict(wrapped, state(fresh()))
    losses = [
        trainer(model, tmp_path, per_device_eval_batch_size=3).evaluate()["eval_loss"] for model in (fresh(), wrapped)
    ]
    assert losses[0] == losses[1]
    predicted = trainer(fresh(), tmp_path).predict(texts(4)).predictions
    assert predicted.shape == (4, 6, 99)


@pytest.mark.broad
def test_accumulated_gradients_train_as_those_of_the_eager_wrapper_do(tmp_path: Path) -> None:
    start, states = state(fresh()), []
    for model in (fresh(), llfx.wrap(base(), CONFIG)):
        llfx.load_adapter_state_dict(model, start)
        trainer(model, tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=1, max_steps=3).train()
        states.append(state(model))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        close(tensor, states[1][name], 1e-5, name)


@pytest.mark.slow
def test_whole_weights_and_tokens_train_as_in_the_eager_wrapper_and_resume_bit_for_bit(tmp_path: Path) -> None:
    tokens = llfx.TrainableTokens(token_indices=(3, 7, 50), target_names="embed_tokens")
    cfg = [llfx.Full(target_names="(q_proj|norm)$"), llfx.LoRA(r=2), tokens]
    models = [llfx.adapt(base(), cfg), llfx.wrap(base(), cfg), llfx.adapt(base(), cfg)]
    randomise(models[0], 0)
    start = state(models[0])
    assert {"lm_head.lora_weight", "model.norm.lora_weight"} & start.keys() == {"model.norm.lora_weight"}
    for model in models[1:]:
        llfx.load_adapter_state_dict(model, start)
    for number, model in enumerate(models[:2]):
        trainer(model, tmp_path / str(number), save_strategy="steps", save_steps=2, max_steps=4).train()
    whole = state(models[0])
    moved = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert moved == {name for name in whole if whole[name].is_floating_point()}
    for name, tensor in state(models[1]).items():
        close(whole[name], tensor, 1e-5, name)
    checkpoint = tmp_path / "0" / "checkpoint-2"
    assert safetensors.torch.load_file(checkpoint / "model.safetensors").keys() == whole.keys()
    trainer(models[2], tmp_path / "resumed", max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert_same(state(models[2]), whole)


@pytest.mark.broad
def test_training_evaluating_and_generating_share_one_graph(tmp_path: Path) -> None:
    model = fresh()
    trainer(model, tmp_path, max_steps=1).train()
    model.eval()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
    assert len(model.graphs) == 1


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_same_adapters(tmp_path: Path) -> None:
    trainer(fresh(), tmp_path, max_steps=3).train()
    model = adapted()
    trainer(model, tmp_path, max_steps=3, gradient_checkpointing=True).train()
    assert model.is_gradient_checkpointing
    assert checkpoints_layers(model._graphs.first_graph())
    for name, tensor in state(model).items():
        close(tensor, state(shared())[name], 1e-6, name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert len(model.graphs) == 0
    with pytest.raises(llfx.ConfigError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
