"""Golden tables: the sites and roles of small Hugging Face models, written down by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.inspect import SiteTable

VOCABULARY, LABELS = 29, 3


def parse(golden: str) -> dict[str, tuple[set[str], int, int]]:
    """Lines `name  roles...  d_in d_out` as a dict; `-` stands for no role."""
    lines = [line.split() for line in golden.strip().splitlines()]
    return {
        name: (set(roles) - {"-"}, int(d_in), int(d_out)) for name, *roles, d_in, d_out in lines
    }


def roles_of(table: SiteTable) -> dict[str, tuple[set[str], int, int]]:
    return {row.name: (set(row.roles), row.d_in, row.d_out) for row in table}


def check_table(table: SiteTable, golden: str) -> None:
    """The table says exactly what `golden` does, and gives a reason for every role."""
    assert roles_of(table) == parse(golden)
    for row in table:
        assert all(f"{role}: " in row.reason for role in row.roles), row


# The models, one layer each, and their tables.

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "layerdrop": 0.0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32}

LLAMA = """
model.layers.0.self_attn.q_proj   query reader    16  16
model.layers.0.self_attn.k_proj   key reader      16   8
model.layers.0.self_attn.v_proj   value reader    16   8
model.layers.0.self_attn.o_proj   output writer   16  16
model.layers.0.mlp.gate_proj      gate reader     16  24
model.layers.0.mlp.up_proj        up reader       16  24
model.layers.0.mlp.down_proj      down writer     24  16
lm_head                           head reader     16  29
"""

WIDE_HEADS = """
model.layers.0.self_attn.q_proj   query reader    16  32
model.layers.0.self_attn.k_proj   key reader      16  16
model.layers.0.self_attn.v_proj   value reader    16  16
model.layers.0.self_attn.o_proj   output writer   32  16
model.layers.0.mlp.gate_proj      gate reader     16  24
model.layers.0.mlp.up_proj        up reader       16  24
model.layers.0.mlp.down_proj      down writer     24  16
lm_head                           head reader     16  29
"""

GPT2 = """
transformer.h.0.attn.c_attn   query key value reader   16  48
transformer.h.0.attn.c_proj   output writer            16  16
transformer.h.0.mlp.c_fc      up reader                16  64
transformer.h.0.mlp.c_proj    down writer              64  16
lm_head                       head reader              16  29
"""

OPT = """
model.decoder.layers.0.self_attn.q_proj     query reader    16  16
model.decoder.layers.0.self_attn.k_proj     key reader      16  16
model.decoder.layers.0.self_attn.v_proj     value reader    16  16
model.decoder.layers.0.self_attn.out_proj   output writer   16  16
model.decoder.layers.0.fc1                  up reader       16  24
model.decoder.layers.0.fc2                  down writer     24  16
lm_head                                     head reader     16  29
"""

# Embeddings of 12 are projected into the stream of 16, and its result out of it before the head.
OPT_PROJECTED = """
model.decoder.project_in                    writer          12  16
model.decoder.layers.0.self_attn.q_proj     query reader    16  16
model.decoder.layers.0.self_attn.k_proj     key reader      16  16
model.decoder.layers.0.self_attn.v_proj     value reader    16  16
model.decoder.layers.0.self_attn.out_proj   output writer   16  16
model.decoder.layers.0.fc1                  up reader       16  24
model.decoder.layers.0.fc2                  down writer     24  16
model.decoder.project_out                   reader          16  12
lm_head                                     head inner      12  29
"""

GPT_NEOX = """
gpt_neox.layers.0.attention.query_key_value   query key value reader   16  48
gpt_neox.layers.0.attention.dense             output writer            16  16
gpt_neox.layers.0.mlp.dense_h_to_4h           up reader                16  24
gpt_neox.layers.0.mlp.dense_4h_to_h           down writer              24  16
lm_head                                       head reader              16  29
"""

_BERT_LAYER = """
bert.encoder.layer.0.attention.self.query     query reader    16  16
bert.encoder.layer.0.attention.self.key       key reader      16  16
bert.encoder.layer.0.attention.self.value     value reader    16  16
bert.encoder.layer.0.attention.output.dense   output writer   16  16
bert.encoder.layer.0.intermediate.dense       up reader       16  24
bert.encoder.layer.0.output.dense             down writer     24  16
"""
BERT_MASKED_LM = f"""{_BERT_LAYER}
cls.predictions.transform.dense               reader          16  16
cls.predictions.decoder                       head inner      16  29
""".replace("\n\n", "\n")
BERT_CLASSIFIER = f"""{_BERT_LAYER}
bert.pooler.dense                             reader          16  16
classifier                                    head inner      16   3
""".replace("\n\n", "\n")

MODELS: dict[str, tuple[type, type, dict[str, Any], str]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _GROUPED, LLAMA),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, _GROUPED, LLAMA),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {**_GROUPED, "head_dim": 8}, WIDE_HEADS),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig, {**_GROUPED, "head_dim": 8}, WIDE_HEADS),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {**_GROUPED, "head_dim": 8}, WIDE_HEADS),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, _GPT2, GPT2),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, {**_OPT, "word_embed_proj_dim": 16}, OPT),
    "opt-projected": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig,
        {**_OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
        OPT_PROJECTED,
    ),
    "gpt-neox-parallel": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        {**_SMALL, "use_parallel_residual": True},
        GPT_NEOX,
    ),
    "gpt-neox-sequential": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        {**_SMALL, "use_parallel_residual": False},
        GPT_NEOX,
    ),
    "bert-masked-lm": (transformers.BertForMaskedLM, transformers.BertConfig, _SMALL, BERT_MASKED_LM),
    "bert-classifier": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        {**_SMALL, "num_labels": LABELS},
        BERT_CLASSIFIER,
    ),
}


def build(name: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    model_class, config_class, fields, _ = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**{**fields, **changes})
    config._attn_implementation = attention
    return model_class(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_sites_and_roles_are_those_of_the_table(name: str, attention: str) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        # transformers refuses it: the logits are soft-capped, which the fused kernel cannot.
        with pytest.raises(ValueError, match="does not support"):
            build(name, attention)
        return
    table = llfx.inspect(build(name, attention))
    check_table(table, MODELS[name][3])
    fused = ["scaled_dot_product_attention" in row.reason for row in table if "query" in row.roles]
    assert fused == [attention == "sdpa"]
