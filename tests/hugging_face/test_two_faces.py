"""A rewritten graph and an adapted model over the same adapters; and the folders that an adapted model writes."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.models import one_layer_llama

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
CONFIGS = [llfx.LoRA(r=2), llfx.VeRA(r=2, target_roles=("up",))]  # VeRA has tensors that all sites share.


@functools.cache
def base() -> Any:
    torch.manual_seed(0)
    return one_layer_llama().eval()


@functools.cache
def graph() -> Any:
    gm = llfx.rewrite(base(), CONFIGS)
    randomise(gm, 0)
    return gm


@functools.cache
def adapted() -> Any:
    return llfx.adapt(graph())


def test_a_graph_and_its_model_run_the_same_parameters() -> None:
    gm, model = graph(), adapted()
    assert isinstance(model, hf.LlamaForCausalLM)
    assert {id(p) for p in llfx.adapter_parameters(model)} == {id(p) for p in llfx.adapter_parameters(gm)}
    close(model(**CALL).logits, gm(**CALL).logits.detach(), 1e-6, "logits")
    model(**CALL).loss.backward()
    torch.optim.SGD(llfx.adapter_parameters(gm), lr=0.5).step()
    close(model(**CALL).logits, gm(**CALL).logits.detach(), 1e-6, "logits after a step")
    merged = llfx.merge(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), merged.generate(IDS, **options))
    graphs: Any = adapted().graphs
    assert len(graphs) == 1
    assert {id(p) for p in llfx.adapter_parameters(graphs[0])} == {id(p) for p in llfx.adapter_parameters(gm)}


@pytest.mark.slow
def test_graphs_without_adapters_are_refused() -> None:
    with pytest.raises(llfx.AdapterError, match="a graph that has adapters"):
        llfx.adapt(llfx.capture(base()))
    with pytest.raises(llfx.AdapterError, match=r"adapt\(graph\), without a config"):
        llfx.adapt(graph(), llfx.LoRA(r=2))
    with pytest.raises(llfx.ConfigError, match="cfg must be a variant"):
        llfx.adapt(base())


@pytest.mark.broad
def test_continuous_batching_is_refused_with_a_way_out() -> None:
    with pytest.raises(llfx.AdapterError, match=r"merge\(model\)\.generate_batch"):
        adapted().generate_batch([[5, 6, 7]], progress_bar=False)


def test_a_model_that_peft_has_changed_says_so(tmp_path: Path) -> None:
    model = llfx.adapt(one_layer_llama(), llfx.LoRA(r=2, target_names="q_proj"))
    changed = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    words = r"q_proj.lora_A' is a ModuleDict and not a tensor, because .*get_peft_model .* The way out: insert all"
    assert re.search(rf"adapters that cannot be read: '.*{words}", repr(changed))
    with pytest.raises(llfx.AdapterError, match=words):
        llfx.adapters(model)
    with pytest.raises(llfx.AdapterError, match=words):
        llfx.save(model, tmp_path / "adapter")


@pytest.mark.broad
def test_a_saved_folder_is_loaded_by_peft_by_transformers_and_by_the_adapted_class(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = llfx.adapt(loaded, llfx.LoRA(r=2))
    randomise(model, 0)
    expected = model(**CALL).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] == "CAUSAL_LM"
    close(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(**CALL).logits, expected, 1e-5, "PEFT")
    close(hf.LlamaForCausalLM.from_pretrained(tmp_path / "adapter")(**CALL).logits, expected, 1e-5, "transformers")
    again = type(model).from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    close(again(**CALL).logits, expected, 1e-6, "the adapted class")

    start = time.perf_counter()
    with pytest.raises(llfx.CheckpointError, match=r"adapt\(LlamaForCausalLM\.from_pretrained\(base\)"):
        type(model).from_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "adapter")  # two adapters, for which PEFT has no form
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["model.safetensors"]
    with pytest.raises(llfx.CheckpointError, match="does not exist"):
        type(model).from_pretrained(tmp_path / "adapter")
    assert time.perf_counter() - start < 30
