"""Changing alpha, or any field that is maths alone, of adapters that have values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise, unchanged
from tests.support.models import one_layer_llama
from tests.support.selection import broad_after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.fc(x)))
        return y


LORA = llfx.LoRA(r=2, alpha=4.0, target_names=("fc", "head"))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def made(how: Any, cfg: Any = LORA) -> Any:
    model = how(Net(), cfg)
    randomise(model, 2)
    return model


@pytest.mark.parametrize("how", [llfx.rewrite, llfx.wrap])
@pytest.mark.parametrize(
    "cfg", broad_after(1, [LORA, llfx.DoRA(r=2, target_names="."), llfx.PiSSA(r=2, target_names=".")])
)
def test_a_model_with_another_alpha_is_that_of_a_config_with_it(how: Any, cfg: Any) -> None:
    model, before = made(how, cfg), made(how, cfg)(X)
    with unchanged(model):
        changed = llfx.reconfigure(model, alpha=32.0)
    assert torch.equal(model(X), before)
    assert torch.equal(changed(X), made(how, replace(cfg, alpha=32.0))(X))
    assert not torch.allclose(changed(X), before)
    assert llfx.adapters(changed)[0].config == replace(cfg, alpha=32.0)
    for name, tensor in model.named_parameters():
        assert changed.get_parameter(name) is tensor or not tensor.requires_grad


@pytest.mark.broad
def test_an_optimizer_goes_on_and_a_file_has_the_new_config(tmp_path: Path) -> None:
    model = made(llfx.rewrite).train()
    optimizer = torch.optim.SGD(llfx.adapter_parameters(model), lr=0.1)
    changed = llfx.reconfigure(model, alpha=8.0, dropout=0.5, rank_stabilized=True)
    assert changed.training
    before = changed.eval()(X)
    changed(X).sum().backward()
    optimizer.step()
    assert not torch.equal(changed(X), before)
    llfx.save(changed, tmp_path / "adapter")
    loaded = llfx.load(Net(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(X), changed(X))
    assert llfx.adapters(loaded)[0].config == llfx.adapters(changed)[0].config
    assert torch.allclose(llfx.merge(changed)(X), changed(X), atol=1e-5)


@pytest.mark.broad
def test_one_of_several_adapters_is_chosen_by_its_index() -> None:
    cfgs = [llfx.IA3(target_names="."), LORA, replace(LORA, alpha=1.0)]
    model = made(llfx.rewrite, cfgs)
    changed = llfx.reconfigure(model, 1, alpha=32.0)
    assert [row.config for row in llfx.adapters(changed)] == [cfgs[0], replace(LORA, alpha=32.0), cfgs[2]]
    assert torch.equal(changed(X), made(llfx.rewrite, [cfgs[0], replace(LORA, alpha=32.0), cfgs[2]])(X))
    assert torch.equal(llfx.remove(changed)(X), Net()(X))


@pytest.mark.broad
def test_what_started_from_data_needs_none_again() -> None:
    model = llfx.rewrite(Net(), llfx.EVA(r=2, target_names="."), calibration=[(X,)])
    randomise(model, 2)
    changed = llfx.reconfigure(model, alpha=1.0)
    assert torch.equal(changed.get_parameter("fc.lora_A"), model.get_parameter("fc.lora_A"))
    assert not torch.allclose(changed(X), model(X))


@pytest.mark.broad
def test_an_adapted_model_generates_with_another_alpha() -> None:
    model = one_layer_llama()
    ids: dict[str, Any] = {"input_ids": torch.arange(6).view(1, 6)}
    chat = llfx.adapt(model, llfx.LoRA(r=2, alpha=2.0, target_names="_proj"))
    randomise(chat, 2)
    before = chat(**ids).logits
    changed = llfx.reconfigure(chat, alpha=20.0)
    expected = llfx.adapt(model, llfx.LoRA(r=2, alpha=20.0, target_names="_proj"))
    llfx.load_adapter_state_dict(expected, llfx.adapter_state_dict(chat))
    assert torch.equal(changed(**ids).logits, expected(**ids).logits)
    assert torch.equal(chat(**ids).logits, before)
    assert not torch.allclose(changed(**ids).logits, before)
    assert all(a is b for a, b in zip(llfx.adapter_parameters(chat), llfx.adapter_parameters(changed), strict=True))
    assert changed.generate(**ids, max_new_tokens=3).shape == (1, 9)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a shape": (
        {"r": 4},
        "LoRA: r=4 makes lora_A at 'fc' (4, 8), trained in place of (2, 8), trained, so that its values cannot stay."
        " The way out: rewrite(remove(model), cfg) makes a new adapter.",
    ),
    "what trains": (
        {"train_A": False},
        "LoRA: train_A=False makes lora_A at 'fc' (2, 8), frozen in place of (2, 8), trained, so that its values"
        " cannot stay. The way out: rewrite(remove(model), cfg) makes a new adapter.",
    ),
    "a further tensor": (
        {"bias": True, "alpha": 2.0},
        "LoRA: bias=True, alpha=2.0 makes lora_bias at 'fc' (8,), trained in place of nothing, so that its values"
        " cannot stay. The way out: rewrite(remove(model), cfg) makes a new adapter.",
    ),
    "the sites": (
        {"target_names": "fc"},
        "LoRA: target_names says where an adapter is or of which type, and its tensors are there already. The way out:"
        " rewrite(remove(model), cfg) makes a new adapter.",
    ),
    "another name": (
        {"lora_alpha": 3},
        "LoRA has no field 'lora_alpha'; it has alpha, alpha_pattern, bias, dropout, init_weights, r, rank_pattern,"
        " rank_stabilized, train_A.",
    ),
    "an impossible value": ({"alpha": "x"}, "LoRA: alpha must be a finite number, got 'x'."),
    "the same value": ({"alpha": 4.0}, "LoRA: alpha=4.0 changes nothing at any site of adapter 0."),
    "nothing": ({}, "reconfigure takes the fields to change: reconfigure(model, alpha=32)."),
    "an index": (
        {"adapter": 3, "alpha": 2.0},
        "The model has the configs 0; choose one of them: reconfigure(model, 0, alpha=2.0).",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
def test_what_would_lose_values_is_refused(how: Any, mistake: str) -> None:
    fields, message = MISTAKES[mistake]
    with pytest.raises(llfx.ConfigError) as caught:
        llfx.reconfigure(made(how), **fields)
    assert str(caught.value) == message


def test_an_alpha_that_patterns_hide_everywhere_and_a_choice_that_is_open_are_refused() -> None:
    model = made(llfx.rewrite, replace(LORA, alpha_pattern={".": 2.0}))
    with pytest.raises(llfx.ConfigError, match=r"^LoRA: alpha=32 changes nothing at any site of adapter 0\.$"):
        llfx.reconfigure(model, alpha=32)
    with pytest.raises(llfx.ConfigError, match=r"^The model has the configs 0, 1; choose one of them: "):
        llfx.reconfigure(made(llfx.rewrite, [LORA, LORA]), alpha=2.0)
    with pytest.raises(llfx.AdapterError, match="Net has no adapters"):
        llfx.reconfigure(Net(), alpha=2.0)
