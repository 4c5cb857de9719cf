"""Statistics of an adapted model: in its files, in models that are made of it, and never in the user's model."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import lora_lite_fx as llfx
from tests.support.statistics import silent
from tests.support.untouched import untouched

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2])
LORA = llfx.LoRA(r=2, target_names=("classifier",))


def build() -> Any:
    torch.manual_seed(0)
    config: Any = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    config.num_labels = 3
    return hf.ResNetForImageClassification(config).eval()


def trained(model: Any, steps: int = 2) -> Any:
    model.train()
    optimizer = torch.optim.SGD(llfx.adapter_parameters(model), 0.5)
    for step in range(steps):
        optimizer.zero_grad()
        model(pixel_values=(3 + step) * X + 1, labels=LABELS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(pixel_values=X).logits


@functools.cache
def adapted() -> tuple[Any, Any]:
    base = build()
    return base, trained(llfx.adapt(base, LORA, verify=False))


def same(one: Any, other: Any) -> bool:
    return torch.allclose(logits(one), logits(other), atol=1e-5)


@pytest.mark.broad
def test_a_folder_of_an_adapted_model_brings_its_statistics_back(tmp_path: Path) -> None:
    base, model = adapted()
    with pytest.warns(UserWarning, match="save_peft writes adapters only, and training has changed"):
        model.save_pretrained(tmp_path)
    with untouched(base), silent():
        assert same(llfx.adapt(base, tmp_path, verify=False), model)


@pytest.mark.broad
def test_a_file_of_an_adapted_model_is_loaded_alone_or_as_a_trainer_resumes(tmp_path: Path) -> None:
    base, model = adapted()
    file = tmp_path / "adapter.safetensors"
    llfx.save(model, file)
    with untouched(base):
        fresh: Any = llfx.adapt(base, LORA, verify=False)
        with pytest.raises(llfx.CheckpointError, match="other values of the buffers resnet"):
            fresh.load_adapter(file, "more")
        fresh.load_state_dict(load_file(file), strict=False)
        assert same(fresh, model)


@pytest.mark.broad
def test_models_that_are_made_of_an_adapted_one_have_statistics_of_their_own() -> None:
    base, model = adapted()
    with untouched(base, model):
        removed, merged, twin = llfx.remove(model), llfx.merge(model), copy.deepcopy(model)
        assert torch.equal(logits(removed), logits(base))
        assert same(merged, model)
        trained(twin)
        for each in (removed, merged):
            each.train()(pixel_values=4 * X)
        assert not same(twin, model)
        assert torch.equal(logits(llfx.remove(twin)), logits(base))


@pytest.mark.broad
def test_a_second_graph_and_another_adapter_leave_the_bases_statistics() -> None:
    base, model = adapted()
    model = copy.deepcopy(model)
    model(pixel_values=X, output_hidden_states=True)
    llfx.add(model, {"more": LORA})
    model.resnet.pooler = torch.nn.AdaptiveAvgPool2d((1, 1))
    model._graphs.drop()
    assert same(model, adapted()[1])
    assert torch.equal(logits(llfx.remove(model)), logits(base))


@pytest.mark.broad
def test_a_graph_and_the_model_that_is_made_of_it_train_the_same_statistics(tmp_path: Path) -> None:
    base = build()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        graph = trained(llfx.rewrite(base.train(), LORA, {"pixel_values": X, "labels": LABELS}))
        base.eval()
        model: Any = llfx.adapt(graph)
    assert len([each for each in record if "besides the adapters" in str(each.message)]) == 1
    assert same(model, graph)
    before = logits(graph)
    trained(model)
    assert same(model, graph)
    assert not torch.allclose(logits(graph), before, atol=1e-3)
    llfx.save(model, tmp_path / "adapter.safetensors")
    assert same(llfx.load(base, tmp_path / "adapter.safetensors", {"pixel_values": X}), graph)
    assert torch.equal(logits(llfx.remove(model)), logits(base))


@pytest.mark.broad
def test_a_frozen_model_with_changed_statistics_is_told_of() -> None:
    _, model = adapted()
    with pytest.warns(UserWarning, match="Without its adapters the model is not the base"), model.disable_adapter():
        pass
