"""Merging into quantized weights: dense ones, or quantized again with an error that is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.compare import close
from tests.storage.test_dequantized import X, adapted, base
from tests.support.models import tiny_llama
from tests.support.quantized import STORAGES, bnb, dequantized, effective_weight, storages, torchao
from tests.support.selection import slow_unless


@pytest.mark.parametrize("storage", storages("nf4 twice"))
def test_merge_makes_dense_weights_of_the_adapted_sites_alone(storage: str) -> None:
    model = base(storage)
    gm = adapted("exported", model, llfx.LoRA(r=4, target_names="out"))
    merged = llfx.merge(gm)
    close(merged(*X), gm(*X), 1e-5, "merged")
    types = {name: parameter.dtype for name, parameter in merged.named_parameters() if name.endswith("weight")}
    assert types["out.weight"] == torch.float32
    assert types["layers.0.0.weight"] is not torch.float32
    assert not [name for name, _ in merged.named_buffers() if name.startswith("out.")]


@pytest.mark.parametrize("storage", storages("torchao int4", "int8"))
def test_requantised_weights_are_those_that_the_library_makes_and_their_errors_are_told(storage: str) -> None:
    model = base(storage)
    gm = adapted("traced", model)
    dense = llfx.merge(gm)
    merged = llfx.merge(gm, requantise=True)
    plain = llfx.remove(gm)
    assert str(merged.graph) == str(plain.graph)
    assert {n: t.dtype for n, t in merged.named_parameters()} == {n: t.dtype for n, t in plain.named_parameters()}
    again = dequantized(model)
    for name, module in again.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dense.get_parameter(f"{name}.weight").detach()
    expected = dequantized(STORAGES[storage](again))
    close(merged(*X), expected(*X), 1e-5, "requantised")
    exact = dense.get_parameter("out.weight")
    error = (expected.get_parameter("out.weight") - exact).norm() / exact.norm()
    assert merged.requantised.keys() == {"layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "out"}
    assert abs(merged.requantised["out"] - float(error)) < 1e-6
    assert 1e-3 < error < (1 if storage in ("hqq 2, by columns", "hqq 1") else 0.2)


def test_requantise_is_refused_where_nothing_is_quantized() -> None:
    model = dequantized(base("int8"))
    with pytest.raises(llfx.AdapterError, match=r"no site of the base is quantized.*merge\(model\)"):
        llfx.merge(adapted("traced", model), requantise=True)


def quantized_llama(kind: str, folder: Path) -> Any:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_llama(hidden_size=64, intermediate_size=64)).save_pretrained(folder)
    configs: dict[str, Any] = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    }
    config = configs[kind]
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    state = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in llfx.adapter_state_dict(model).items()}
    llfx.load_adapter_state_dict(model, state)
    return model


IDS = torch.randint(99, (2, 5), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind == "nf4", ["nf4", "int8", "torchao int8"]))
def test_an_adapted_model_comes_back_quantized_or_merged(kind: str, tmp_path: Path) -> None:
    model = quantized_llama(kind, tmp_path)
    quantized_type = type(model.model.layers[0].mlp.up_proj)
    before = {n: effective_weight(m) for n, m in model.named_modules() if type(m) is quantized_type}
    chat = moved(llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up", "query"))))
    removed = llfx.remove(chat)
    assert type(removed) is type(model)
    for name, weight in before.items():
        assert type(removed.get_submodule(name)) is quantized_type
        assert torch.equal(effective_weight(removed.get_submodule(name)), weight)
    merged = llfx.merge(chat)
    close(logits(merged), logits(chat), 1e-5 if kind == "torchao int8" else 5e-2, "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(merged.model.layers[0].mlp.down_proj) is quantized_type
    again = llfx.merge(chat, requantise=True)
    assert type(again.model.layers[0].mlp.up_proj) is quantized_type
    assert again.requantised.keys() == {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}
    exact = merged.model.layers[0].mlp.up_proj.weight
    off = (effective_weight(again.model.layers[0].mlp.up_proj) - exact).norm() / exact.norm()
    assert abs(off - again.requantised["model.layers.0.mlp.up_proj"]) < 1e-5


def test_a_model_that_is_merged_in_part_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = quantized_llama("nf4", tmp_path / "base")
    merged = llfx.merge(moved(llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up", "query")))))
    merged.save_pretrained(tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(loaded.model.layers[0].mlp.down_proj, bnb.nn.Linear4bit)
    assert isinstance(loaded.lm_head, nn.Linear)
    close(logits(loaded), logits(merged), 1e-5, "loaded")
