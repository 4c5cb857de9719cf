"""Merging into quantized weights: dense ones, or quantized again with an error that is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.storage.test_dequantized import X, adapted, base
from tests.support.models import tiny_llama
from tests.support.quantized import STORAGES, dequantized, effective_weight, library, storages
from tests.support.selection import broad_after, slow_after, slow_unless


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


@pytest.mark.broad
@pytest.mark.parametrize("storage", broad_after(1, storages("torchao int4", "int8")))
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
    assert 1e-3 < error < (1 if storage in ("hqq 2, by columns", "hqq 1", "quanto int2") else 0.2)


def test_requantise_is_refused_where_nothing_is_quantized() -> None:
    model = dequantized(base("int8"))
    with pytest.raises(llfx.AdapterError, match=r"no site of the base is quantized.*merge\(model\)"):
        llfx.merge(adapted("traced", model), requantise=True)


def quantized_llama(kind: str, folder: Path) -> Any:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(tiny_llama(hidden_size=64, intermediate_size=64))
        if kind == "compressed 4":
            STORAGES[kind](model)
        model.save_pretrained(folder)
        if kind == "compressed 4":
            compressors = library("compressed_tensors.compressors")
            compressors.ModelCompressor.from_pretrained_model(model).update_config(folder)
    twice = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    configs: dict[str, tuple[str, Callable[[], Any]]] = {
        "nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, **twice)),
        "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
        "torchao int8": ("torchao", lambda: TorchAoConfig(library("torchao.quantization").Int8WeightOnlyConfig())),
        "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
        "quanto int4": ("optimum.quanto", lambda: QuantoConfig(weights="int4")),
    }
    if kind == "compressed 4":
        return LlamaForCausalLM.from_pretrained(folder)
    needed, config = configs[kind]
    library(needed)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config())


KINDS = ("nf4", "int8", "torchao int8", "quanto int8", "quanto int4", "compressed 4")


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


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind == "nf4", KINDS))
def test_an_adapted_model_comes_back_quantized_or_merged(kind: str, tmp_path: Path) -> None:
    model = quantized_llama(kind, tmp_path)
    quantized_type = type(model.model.layers[0].mlp.up_proj)
    before = {n: effective_weight(m) for n, m in model.named_modules() if type(m) is quantized_type}
    chat = moved(llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up", "query"))))
    removed = llfx.remove(chat)
    assert type(removed) is type(model)
    assert getattr(removed, "is_loaded_in_4bit", False) is (kind == "nf4")
    assert not chat.is_loaded_in_4bit
    for name, weight in before.items():
        assert type(removed.get_submodule(name)) is quantized_type
        assert torch.equal(effective_weight(removed.get_submodule(name)), weight)
    merged = llfx.merge(chat)
    close(logits(merged), logits(chat), 5e-2 if kind in ("nf4", "int8") else 1e-5, "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(merged.model.layers[0].mlp.down_proj) is quantized_type
    again = llfx.merge(chat, requantise=True)
    assert type(again.model.layers[0].mlp.up_proj) is quantized_type
    assert again.requantised.keys() == {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}
    exact = merged.model.layers[0].mlp.up_proj.weight
    off = (effective_weight(again.model.layers[0].mlp.up_proj) - exact).norm() / exact.norm()
    assert abs(off - again.requantised["model.layers.0.mlp.up_proj"]) < 1e-5


@pytest.mark.broad
@pytest.mark.parametrize("kind", slow_after(1, ["nf4", "compressed 4"]))
def test_a_model_that_is_merged_in_part_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = quantized_llama(kind, tmp_path / "base")
    merged = llfx.merge(moved(llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up", "query")))))
    merged.save_pretrained(tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(loaded.model.layers[0].mlp.down_proj) is type(model.model.layers[0].mlp.down_proj)
    assert isinstance(loaded.lm_head, nn.Linear)
    quantized = {name for name, _ in loaded.named_parameters() if name.endswith(("weight_packed", "absmax"))}
    assert not {name for name in quantized if "up_proj" in name or "q_proj" in name}
    close(logits(loaded), logits(merged), 1e-5, "loaded")


@pytest.mark.broad
def test_an_adapted_model_stays_compressed_whatever_the_call_of_the_base_does(tmp_path: Path) -> None:
    model = quantized_llama("compressed 4", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chat = moved(llfx.adapt(model, llfx.LoRA(r=2, target_roles=("up",))))
    expected, merged = logits(chat), logits(llfx.merge(chat))
    base = logits(model)  # which decompresses it
    close(logits(chat), expected, 0, "adapted")
    close(logits(llfx.merge(chat)), merged, 0, "merged")
    close(logits(llfx.remove(chat)), base, 1e-6, "removed")
    with pytest.raises(llfx.ConfigError, match=r"a call of the model decompressed it.*load the model again"):
        llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("up",)))
