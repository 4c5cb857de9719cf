"""Bases whose products quantize their inputs, as torchao's dynamic ones do, pass no right gradients on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite_fx as llfx

CFG = llfx.LoRA(r=2, target_names="first")
X = (torch.randn(3, 4),)


def torchao_class(name: str, **fields: Any) -> type[Tensor]:
    """A class that looks like one of torchao's, which computes like an ordinary tensor."""
    return type(name, (Tensor,), {"__module__": "torchao.quantization", **fields})


DYNAMIC = {
    "Int8Tensor": torchao_class("Int8Tensor", act_quant_kwargs="per row"),
    "IntxUnpackedToInt8Tensor": torchao_class("IntxUnpackedToInt8Tensor", activation_quantization="per token"),
    "LinearActivationQuantizedTensor": torchao_class("LinearActivationQuantizedTensor"),
    "static": torchao_class("Int8Tensor", act_quant_kwargs=None, act_quant_scale=torch.ones(1)),
    "inside": torchao_class(
        "WeightTensorWithLinearActivationScaleMetadata",
        original_weight_tensor=torch.ones(1).as_subclass(torchao_class("LinearActivationQuantizedTensor")),
    ),
}
WEIGHT_ONLY = torchao_class("Int8Tensor", act_quant_kwargs=None, act_quant_scale=None, activation_quantization=None)


class Net(nn.Module):
    """The quantized product comes after the one to adapt."""

    def __init__(self, kind: type[Tensor] = Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if kind is not Tensor:
            weight = self.second.weight.detach().as_subclass(kind)
            self.second.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    gm = llfx.rewrite(Net(), CFG)
    llfx.save(gm, folder / "file")
    llfx.save_lora_lite(gm, folder / "lite")
    llfx.save_peft(gm, folder / "peft")
    return folder


PATHS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "rewrite": lambda model, _: llfx.rewrite(model, CFG, X),
    "rewrite, symbolic": lambda model, _: llfx.rewrite(model, CFG),
    "rewrite of a graph": lambda model, _: llfx.rewrite(llfx.capture(model, X), CFG),
    "wrap": lambda model, _: llfx.wrap(model, CFG, X),
    "backend": lambda model, _: llfx.backend(CFG, inner="eager").adapt(model, *X),
    "load": lambda model, saved: llfx.load(model, saved / "file"),
    "load_lora_lite": lambda model, saved: llfx.load_lora_lite(model, saved / "lite"),
    "load_peft": lambda model, saved: llfx.load_peft(model, saved / "peft"),
}


@pytest.mark.parametrize("path", PATHS)
def test_no_path_adapts_a_base_that_quantizes_inputs(path: str, saved: Path) -> None:
    with pytest.raises(llfx.ConfigError, match=r"quantizes the inputs of 1 .*second\.weight.*Int8WeightOnlyConfig"):
        PATHS[path](Net(DYNAMIC["Int8Tensor"]), saved)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_each_kind_is_recognized(kind: str) -> None:
    with pytest.raises(llfx.ConfigError, match="quantizes the inputs"):
        llfx.rewrite(Net(DYNAMIC[kind]), CFG)


def test_adapt_refuses_it_too() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    weight = model.lm_head.weight.detach().as_subclass(DYNAMIC["Int8Tensor"])
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(llfx.ConfigError, match=r"quantizes the inputs of 1 .*lm_head\.weight"):
        llfx.adapt(model, llfx.LoRA(r=2))


def test_a_base_whose_weights_alone_are_quantized_is_adapted(saved: Path) -> None:
    for path in ("rewrite", "wrap", "load"):
        PATHS[path](Net(WEIGHT_ONLY), saved)


def test_a_base_that_quantizes_inputs_can_be_captured_and_inspected() -> None:
    assert [row.name for row in llfx.inspect(llfx.capture(Net(DYNAMIC["Int8Tensor"]), X))][:1] == ["first"]
