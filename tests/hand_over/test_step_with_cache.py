"""`export(cache=True)`: one program prefills and decodes, with a cache of plain tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

import lora_lite_fx as llfx
from tests.hand_over.test_exported_program import LOADS
from tests.support.captured import captured
from tests.support.conformance import randomise
from tests.support.models import GatedMLP, ids, net, one_layer_llama
from tests.support.selection import broad_after, slow_after

CFG = llfx.LoRA(r=2, target_roles=("attention", "mlp"))
SIZES: Any = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32, "head_dim": 8}


def mistral() -> Any:
    """Return a model all of whose layers have a sliding window."""
    config = MistralConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=1, sliding_window=3)
    return MistralForCausalLM(config).eval()


def gemma3() -> Any:
    """Return a model whose cache has layers of two kinds."""
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=1, sliding_window=3, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens and their mask, where the first row is padded on the left."""
    tokens = torch.randint(1, 32, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(tokens)
    if batch > 1:
        mask[0, :2] = 0
    return tokens, mask


def empty_cache(program: Any, batch: int) -> dict[str, Tensor]:
    """Return the cache of no tokens, as the inputs of a program say."""
    names = [name for name in program.graph_signature.user_inputs if name.startswith("past_")]
    nodes = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    return {name: torch.zeros(batch, nodes[name].shape[1], 0, nodes[name].shape[3]) for name in names}


@torch.no_grad()
def check_steps(program: Any, model: Any, **further: Any) -> None:
    """Check prefilling from an empty cache and tokens one by one, for several batches, against calls of the model."""
    module = program.module()
    for batch, ends in ((1, (1, 2, 3, 8)), (2, (5, 6, 7)), (3, (4, 9))):
        tokens, mask = text(batch, ends[-1])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, begin = empty_cache(program, batch), 0
        for end in ends:
            inputs = {"input_ids": tokens[:, begin:end], "attention_mask": mask[:, :end]}
            if "position_ids" in program.graph_signature.user_inputs:
                inputs["position_ids"] = positions[:, begin:end]
            logits, *present = module(**inputs, **cache)
            cache = dict(zip(cache, present, strict=True))
            assert all(tensor.shape[2] == end for tensor in present)
            seen = mask[:, begin:end].bool()
            torch.testing.assert_close(logits[seen], expected[:, begin:end][seen], atol=1e-5, rtol=1e-5)
            begin = end


@pytest.mark.parametrize("build", broad_after(1, slow_after(2, [one_layer_llama, gemma3, mistral])))
def test_one_program_prefills_and_decodes(build: Any) -> None:
    model = llfx.adapt(build().eval(), CFG)
    randomise(model, 0)
    inputs = {name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")}
    program = llfx.export(model, inputs, cache=True)
    check_steps(program, model)
    assert llfx.adapter_state_dict(model).keys() <= program.state_dict.keys()


@pytest.mark.broad  # as files without a cache, which are tried every day
def test_a_file_with_a_cache_runs_where_torch_alone_is(tmp_path: Path) -> None:
    model, graph = captured(one_layer_llama)
    gm = llfx.rewrite(graph, llfx.DoRA(r=2, target_roles=("attention", "mlp")))
    randomise(gm, 0)
    program = llfx.export(gm, cache=True, bake=True)
    torch.export.save(program, tmp_path / "m.pt2")
    tokens, mask = text(2, 6)
    mask[:] = 1
    torch.save({"input_ids": tokens, "attention_mask": mask, **empty_cache(program, 2)}, tmp_path / "inputs.pt")
    paths = [str(tmp_path / name) for name in ("m.pt2", "inputs.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", LOADS, *paths], check=True, timeout=120)
    with torch.no_grad():
        expected = gm(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(torch.load(paths[2])[0], expected, atol=1e-5, rtol=1e-5)
    assert model is not None  # the graph refers to it weakly, and its step is captured from it


@pytest.mark.broad
def test_merged_models_and_the_base_alone() -> None:
    model = llfx.adapt(one_layer_llama().eval(), CFG)
    randomise(model, 0)
    names = {name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")}
    with llfx.active(model, []):
        program = llfx.export(model, names, cache=True)
        check_steps(program, model)
    assert not program.state_dict.keys() & llfx.adapter_state_dict(model).keys()
    merged = llfx.merge(model)
    check_steps(llfx.export(merged, names, cache=True), merged)


def test_what_has_no_step_is_refused() -> None:
    bert = BertModel(
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(llfx.ConfigError, match=r"BertModel is not a causal language model.*cache=False"):
        llfx.export(bert, cache=True)
    for model in (net(GatedMLP), nn.Linear(2, 2)):
        with pytest.raises(llfx.AdapterError):
            llfx.export(model, {"ids": ids(2, 5)}, cache=True)
    with pytest.raises(llfx.ConfigError, match=r"takes inputs for tokens.*and not labels"):
        llfx.export(one_layer_llama().eval(), {"labels": torch.ones(1, 1)}, cache=True)


@pytest.mark.broad
def test_the_recipe_of_transformers_for_a_static_cache_is_refused_with_the_way_out() -> None:
    model = one_layer_llama().eval()
    model.generation_config.cache_implementation = "static"
    chat = llfx.adapt(model, CFG)
    randomise(chat, 0)
    tokens = text(1, 4)[0]
    example = {"input_ids": tokens[:, :1], "cache_position": torch.tensor([0])}
    recipe = TorchExportableModuleWithStaticCache(chat, batch_size=1, max_cache_len=8)
    with (
        torch.no_grad(),
        pytest.raises(llfx.AdapterError, match=r"static cache.*cache=True\).*merge"),
    ):
        torch.export.export(recipe, (), example, strict=False)
    with torch.no_grad(), pytest.raises(Exception, match=r"llfx.export\(model, cache=True\)"):
        torch.export.export(recipe, (), example, strict=True)  # torch.compile wraps the error

    recipe = TorchExportableModuleWithStaticCache(llfx.merge(chat), batch_size=1, max_cache_len=8)
    with torch.no_grad():
        program = torch.export.export(recipe, (), example, strict=False).module()
        expected = chat(input_ids=tokens, use_cache=False).logits
        steps = [{"input_ids": tokens[:, n : n + 1], "cache_position": torch.tensor([n])} for n in range(4)]
        logits = torch.cat([program(**step) for step in steps], 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
