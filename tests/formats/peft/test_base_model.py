"""PEFT directories and their base: it is found again by PEFT, and compared when an adapter is loaded."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_lite_fx as llfx
from lora_lite_fx.formats.peft.base_model import base_fields
from lora_lite_fx.formats.safetensors_files import tensor_bytes
from lora_lite_fx.formats.untrusted_files import read_safetensors
from tests.support.conformance import randomise
from tests.support.peft_models import CASES, captured, llama
from tests.support.selection import broad_after, slow_after

IDS = torch.tensor([[3, 4, 5], [6, 7, 1]])
NAMES = ("q_proj", "down_proj")


def written(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def saved_llama(folder: Path) -> Any:
    torch.manual_seed(0)
    model: Any = llama()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.broad
def test_auto_peft_model_finds_the_base_when_the_model_is_gone(tmp_path: Path) -> None:
    model = saved_llama(tmp_path / "base")
    gm = llfx.rewrite(llfx.capture(model), llfx.LoRA(r=2, target_names=NAMES)).eval()
    randomise(gm, 3)
    del model
    gc.collect()
    llfx.save_peft(gm, tmp_path / "adapter")
    config = written(tmp_path / "adapter")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["task_type"], config["auto_mapping"]) == ("CAUSAL_LM", None)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    expected = gm(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(found(input_ids=IDS).logits, expected, atol=1e-5)


CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
T5 = T5Config(vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)


@pytest.mark.broad
@pytest.mark.parametrize("how", slow_after(1, [llfx.wrap, llfx.adapt]))
def test_adapted_and_wrapped_models_name_their_base_too(how: Any) -> None:
    model = LlamaForCausalLM(CONFIG)
    model.config._name_or_path, model.config._commit_hash = "someone/model", "abc123"
    written = llfx.to_peft_config(how(model, llfx.LoRA(r=2), {"input_ids": IDS}))
    assert written["base_model_name_or_path"] == "someone/model"
    assert (written["revision"], written["task_type"]) == ("abc123", "CAUSAL_LM")


class Backbone(LlamaModel):
    """A model of a user's own, that PEFT has no task for."""

    main_input_name = "inputs_embeds"


@pytest.mark.parametrize(
    ("build", "task"),
    broad_after(
        1,
        [
            (llama, "CAUSAL_LM"),
            (lambda: LlamaModel(CONFIG), "FEATURE_EXTRACTION"),
            (lambda: T5ForConditionalGeneration(T5), "SEQ_2_SEQ_LM"),
            (lambda: LlamaForSequenceClassification(CONFIG), None),
            (lambda: Backbone(CONFIG), None),
            (lambda: nn.Linear(2, 2), None),
        ],
        several=True,
    ),
)
def test_the_task_is_that_of_the_class(build: Any, task: str | None) -> None:
    model = build()
    fields = base_fields(model)
    assert fields["task_type"] == task
    by_class = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    assert fields["auto_mapping"] == (None if task or type(model) is nn.Linear else by_class)


@pytest.mark.broad
def test_auto_peft_model_finds_a_classifier_by_its_class(tmp_path: Path) -> None:
    LlamaForSequenceClassification(CONFIG).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    gm = llfx.wrap(model, llfx.LoRA(r=2, target_names=NAMES), {"input_ids": IDS})
    randomise(gm, 3)
    llfx.save_peft(gm, tmp_path / "adapter")
    theirs = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=IDS).logits, gm.eval()(input_ids=IDS).logits, atol=1e-5)


# Another base.


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def test_another_base_is_a_warning_as_in_load(tmp_path: Path) -> None:
    llfx.save_peft(llfx.rewrite(Net(), llfx.LoRA(r=2, target_names="fc")), tmp_path)
    with pytest.warns(UserWarning, match="made for other weights than the model's, at 1 of 1 site") as caught:
        llfx.load_peft(Net(1), tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llfx.load_peft(Net(), tmp_path)
        llfx.load_peft(Net().to(torch.bfloat16), tmp_path)


def test_an_adapter_that_is_tied_to_its_weights_is_refused_on_others(tmp_path: Path) -> None:
    llfx.save_peft(llfx.rewrite(Net(), llfx.PiSSA(r=2, target_names="fc")), tmp_path, as_lora=False)
    llfx.load_peft(Net(), tmp_path)
    with pytest.raises(llfx.CheckpointError, match="means nothing on these"):
        llfx.load_peft(Net(1), tmp_path)


def test_peft_reads_past_the_fingerprints(tmp_path: Path) -> None:
    gm = llfx.rewrite(Net(), llfx.LoRA(r=2, target_names="fc"))
    randomise(gm, 3)
    llfx.save_peft(gm, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert list(json.loads(file.metadata()["lora_lite_fx.base"])) == ["fc"]
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    x = torch.randn(3, 8)
    assert torch.allclose(theirs(x), gm.eval()(x), atol=1e-6)


def test_the_same_adapter_is_written_in_the_same_bytes(tmp_path: Path) -> None:
    gm = llfx.rewrite(Net(), llfx.LoRA(r=2, target_names="fc"))
    for i in range(20):  # safetensors orders the entries of the metadata at random
        llfx.save_peft(gm, tmp_path / str(i))
    files = {(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(20)}
    assert len(files) == 1
    tensors, _ = read_safetensors(tmp_path / "0" / "adapter_model.safetensors")
    odd = {"é": 'é"\n\u2028', "b": "", "format": "pt"}
    (tmp_path / "odd").write_bytes(tensor_bytes(tensors, odd))
    again = read_safetensors(tmp_path / "odd")
    assert again[1] == odd
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again[0].items())


@pytest.mark.broad
def test_without_fingerprints_the_names_are_compared(tmp_path: Path) -> None:
    model, graph = captured("llama")
    config = peft.LoraConfig(target_modules=["q_proj"])
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.peft_config["default"].base_model_name_or_path = "someone/first"
    theirs.save_pretrained(str(tmp_path))

    def load_onto(name: str | None) -> None:
        base: Any = llfx.capture(graph)
        made_from = copy.deepcopy(base.execution.made_from)
        made_from.skeleton.config.name_or_path = name or ""
        base.execution = replace(base.execution, made_from=made_from)
        llfx.load_peft(base, tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("someone/first", "/a/copy/of/First", None):
            load_onto(name)
    with pytest.warns(UserWarning, match="made for 'someone/first', and the model was loaded from 'second'") as caught:
        load_onto("second")
    assert caught[0].filename == __file__


# The form that servers read.


def plain_lora(model: nn.Module, folder: Path) -> nn.Module:
    """Add `alpha / r B A` to the weights, as a server does that reads nothing else."""
    config, merged = written(folder), copy.deepcopy(model)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            ranks = {name.strip("^").replace("\\", ""): r for name, r in config["rank_pattern"].items()}
            alphas = {name.strip("^").replace("\\", ""): r for name, r in config["alpha_pattern"].items()}
            r = ranks.get(site, config["r"])
            assert len(a) == r
            with torch.no_grad():
                weight = merged.get_submodule(site).weight
                weight.add_(alphas.get(site, config["lora_alpha"]) / r * (b @ a).to(weight.dtype))  # type: ignore
    return merged


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, [llfx.PiSSA, llfx.OLoRA]))
@pytest.mark.parametrize("r", broad_after(1, [6, 2]))  # twice 6 is more than the key and value projections have rows
def test_pissa_and_olora_are_written_for_whatever_reads_a_lora(cls: Any, r: int, tmp_path: Path) -> None:
    model, graph = captured("llama")
    inputs = CASES["llama"].inputs((3, 6))
    gm = llfx.rewrite(graph, cls(r=r, alpha=3.0, rank_pattern={"q_proj": 3})).eval()
    randomise(gm, 3)
    llfx.save_peft(gm, tmp_path)
    config = written(tmp_path)
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 2 * r, 6.0)
    with torch.no_grad():
        expected = gm(**inputs).logits
        assert torch.allclose(plain_lora(model, tmp_path)(**inputs).logits, expected, atol=1e-4)
        assert torch.allclose(llfx.load_peft(graph, tmp_path).eval()(**inputs).logits, expected, atol=1e-4)
    assert llfx.to_peft_config(gm) == config
    assert llfx.to_peft_config(gm, as_lora=False)["init_lora_weights"] == cls.__name__.lower()


# HiRA's ranks: PEFT 0.21 gives all sites the rank r, whatever rank_pattern says.


@pytest.mark.broad
def test_hira_of_several_ranks_is_written_so_that_peft_computes_it(tmp_path: Path) -> None:
    model, graph = captured("llama")
    inputs = CASES["llama"].inputs((3, 6))
    cfg = llfx.HiRA(r=4, target_names=NAMES, rank_pattern={"q_proj": 2, r"1\.mlp": 5})
    gm = llfx.rewrite(graph, cfg).eval()
    randomise(gm, 3)
    llfx.save_peft(gm, tmp_path)
    assert written(tmp_path)["r"] == 5
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).double().eval()
    with torch.no_grad():
        expected = gm(**inputs).logits
        assert torch.allclose(theirs(**inputs).logits, expected, atol=1e-6)
        assert torch.allclose(llfx.load_peft(graph, tmp_path).eval()(**inputs).logits, expected, atol=1e-6)


def test_hira_that_peft_saved_with_a_pattern_has_the_ranks_of_its_tensors(tmp_path: Path) -> None:
    config = peft.HiraConfig(r=4, target_modules=["fc"], rank_pattern={"fc": 2})
    theirs: Any = peft.get_peft_model(Net(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hira" in name:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path))
    x = torch.randn(3, 8)
    assert torch.allclose(llfx.load_peft(Net(), tmp_path).eval()(x), theirs(x), atol=1e-5)
    with pytest.raises(llfx.ConfigError, match="gives all its sites the rank r"):
        llfx.from_peft_config(config)
