"""Check that caches do not keep `adapt` from capturing a deep model by a few of its layers."""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx

import lora_lite_fx as llfx
from lora_lite_fx.compat.transformers import CACHE
from tests.support.conformance import randomise
from tests.support.selection import slow_unless

WINDOW = 8  # Shorter than the generated texts.
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
}
MODELS: dict[str, tuple[Any, str]] = {
    "mistral": (lambda: hf.MistralConfig(**SMALL, num_hidden_layers=5), "captured 3, stamped 2"),
    "gemma2": (lambda: hf.Gemma2Config(**SMALL, num_hidden_layers=7), "captured 5, stamped 2"),
    "gemma3": (
        lambda: hf.Gemma3TextConfig(
            **SMALL, num_hidden_layers=9, layer_types=[*["sliding_attention"] * 2, "full_attention"] * 3
        ),
        "captured 7, stamped 2",
    ),
    "gpt_oss": (
        lambda: hf.GptOssConfig(**SMALL, num_hidden_layers=6, num_local_experts=2, num_experts_per_tok=1),
        "captured 5, stamped 1",
    ),
    "llama": (lambda: hf.LlamaConfig(**SMALL, num_hidden_layers=5), "captured 3, stamped 2"),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(MODELS[name][0]()).eval()


def generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return tokens


def described(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """The nodes of a graph. Sizes are numbered, because torch.export calls one by any of the inputs that have it."""
    numbers: dict[str, str] = {}

    def value(node: fx.Node) -> str:
        return re.sub(
            r"\bs\d+\b", lambda name: numbers.setdefault(name[0], f"size {len(numbers)}"), repr(node.meta.get("val"))
        )

    return [(node.format_node() or "output", str(node.args), value(node)) for node in gm.graph.nodes]


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless("mistral".__eq__, MODELS))
def test_decoders_with_caches_are_captured_in_part(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        adapted = llfx.adapt(build(name), llfx.LoRA(r=2))
        randomise(adapted, 0)
        merged = llfx.merge(adapted)
        for length in (3, WINDOW + 4):  # shorter than the window, and longer
            ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(length))
            assert torch.equal(generated(adapted, ids), generated(merged, ids))
    assert MODELS[name][1] in caplog.text
    assert "all layers captured" not in caplog.text


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless("mistral".__eq__, MODELS))
def test_their_graphs_are_those_of_a_capture_in_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_part = llfx.adapt(build(name), llfx.LoRA(r=2)).adapted_graph()
    monkeypatch.setattr(importlib.import_module("lora_lite_fx.capture.depth.by_depth"), "stacks_of", lambda model: {})
    in_full = llfx.adapt(build(name), llfx.LoRA(r=2)).adapted_graph()
    assert described(in_part) == described(in_full)
    assert in_part.code == in_full.code


@pytest.mark.slow
def test_a_cache_whose_layers_have_other_lengths_is_not_taken() -> None:
    """Layers of one class are as long as each other in the graph that is there."""
    adapted = llfx.adapt(build("llama"), llfx.LoRA(r=2))
    ids = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(0))
    cache = adapted(ids, use_cache=True).past_key_values
    cache.layers[3].keys, cache.layers[3].values = (t[:, :, 1:] for t in (cache.layers[3].keys, cache.layers[3].values))
    with pytest.raises(llfx.CaptureError, match=f"input_ids, {CACHE}"):
        adapted(ids[:, :1], **{CACHE: cache})
