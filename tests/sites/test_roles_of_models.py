"""Golden tables: the sites and roles of small Hugging Face models, written down by hand."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.inspection.table import SiteTable
from tests.support.releases import has
from tests.support.selection import broad_after, slow_unless
from tests.support.untouched import untouched

VOCABULARY, LABELS = 29, 3


def parse(golden: str) -> dict[str, tuple[set[str], int, int]]:
    """Parse lines `name  roles...  d_in d_out`; `-` stands for no role."""
    lines = [line.split() for line in golden.splitlines() if line.strip()]
    return {name: (set(roles) - {"-"}, int(d_in), int(d_out)) for name, *roles, d_in, d_out in lines}


def roles_of(table: SiteTable) -> dict[str, tuple[set[str], int, int]]:
    return {row.name: (set(row.roles), row.d_in, row.d_out) for row in table}


def check_table(table: SiteTable, golden: str) -> None:
    """Assert that the table equals `golden` and has a reason for every role."""
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

# Embeddings of width 12 are projected to the stream of width 16. Its result is projected back before the head.
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

GPT_NEOX = f"""
gpt_neox.layers.0.attention.query_key_value   query key value reader   16  48
gpt_neox.layers.0.attention.dense             output writer            16  16
gpt_neox.layers.0.mlp.dense_h_to_4h           up reader                16  24
gpt_neox.layers.0.mlp.dense_4h_to_h           down writer              24  16
{"lm_head" if has("transformers", "5.20") else "embed_out"}  head reader  16  29
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
"""
BERT_CLASSIFIER = f"""{_BERT_LAYER}
bert.pooler.dense                             reader          16  16
classifier                                    head inner      16   3
"""

MODELS: dict[str, tuple[type, type, dict[str, Any], str]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _GROUPED, LLAMA),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, _GROUPED, LLAMA),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        {**_GROUPED, "head_dim": 8},
        WIDE_HEADS,
    ),
    "gemma": (
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig,
        {**_GROUPED, "head_dim": 8},
        WIDE_HEADS,
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**_GROUPED, "head_dim": 8},
        WIDE_HEADS,
    ),
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


def build(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    model_class, config_class, fields, _ = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**{**fields, **changes})
    config._attn_implementation = attention
    return model_class(config).eval()


@pytest.mark.parametrize(
    "case",
    broad_after(
        1,
        slow_unless(
            lambda it: it[1] == "sdpa" or it[0] in ("llama", "gemma2"), itertools.product(MODELS, ["sdpa", "eager"])
        ),
    ),
    ids="-".join,
)
def test_hugging_face_sites_and_roles_are_those_of_the_table(case: tuple[str, str]) -> None:
    name, attention = case
    if (name, attention) == ("gemma2", "sdpa"):
        if not has("transformers", "5.24"):
            pytest.skip("transformers refuses the fused kernel, which cannot cap the logits, since 5.24")
        with pytest.raises(ValueError, match="does not support"):
            build(name, attention)
        return
    table = llfx.inspect(build(name, attention))
    check_table(table, MODELS[name][3])
    fused = ["scaled_dot_product_attention" in row.reason for row in table if "query" in row.roles]
    assert fused == [attention == "sdpa"]


# Selection, by names and by roles.

_HEAD = {"head"}
_MLP = {"0.fc1", "0.fc2", "1.fc1", "1.fc2"}
_ATTENTION = {f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
_QUERIES = {"0.self_attn.q_proj", "1.self_attn.q_proj"}


@functools.cache
def two_layers() -> nn.Module:
    return llfx.capture(build("opt", num_hidden_layers=2, tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("targets", "expected"),
    broad_after(
        2,
        [
            ({}, _ATTENTION | _MLP),
            ({"target_roles": "attention"}, _ATTENTION),
            ({"target_roles": ("mlp",)}, _MLP),
            ({"target_roles": ("query",)}, _QUERIES),
            ({"target_roles": ("query", "mlp")}, _QUERIES | _MLP),
            ({"target_roles": ("head",)}, _HEAD),
            ({"target_roles": ("head", "down")}, _HEAD | {"0.fc2", "1.fc2"}),
            ({"target_roles": ("reader", "writer", "inner")}, _ATTENTION | _MLP),
            ({"target_names": "q_proj"}, _QUERIES),
            (
                {"target_names": (r"\.1\..*[qk]_proj$", "fc2")},
                {"1.self_attn.q_proj", "1.self_attn.k_proj", "0.fc2", "1.fc2"},
            ),
            ({"target_names": (".",)}, _ATTENTION | _MLP | _HEAD),
            ({"target_names": ("^lm_head$",)}, _HEAD),
            ({"exclude_names": "self_attn"}, _MLP),
            (
                {"exclude_names": (r"\.0\.", "out_proj$")},
                {n for n in _ATTENTION | _MLP if n[0] == "1" and "out" not in n},
            ),
            ({"layers": 1}, {n for n in _ATTENTION | _MLP if n[0] == "1"}),
            ({"layers": (0, 1, 7)}, _ATTENTION | _MLP),
            ({"layers": (1,), "target_roles": ("mlp",)}, {"1.fc1", "1.fc2"}),
            (
                {"target_names": ("proj",), "target_roles": ("key", "up")},
                {"0.self_attn.k_proj", "1.self_attn.k_proj"},
            ),
            (
                {
                    "target_names": ("fc", "q_"),
                    "target_roles": ("reader",),
                    "layers": (0,),
                    "exclude_names": ("q_",),
                },
                {"0.fc1"},
            ),
            (
                {"target_names": (".",), "target_roles": ("reader",), "layers": (1,), "exclude_names": ("attn",)},
                {"1.fc1"},
            ),
        ],
        several=True,
    ),
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_selection_is_the_intersection_of_all_targets(targets: dict[str, Any], expected: set[str]) -> None:
    table = llfx.inspect(llfx.rewrite(two_layers(), llfx.LoRA(r=2, **targets)))
    adapted = {row.name.removeprefix("model.decoder.layers.") for row in table if row.adapters}
    assert {"head" if name == "lm_head" else name for name in adapted} == expected


def test_ia3_gates_keys_values_and_down_projections_by_default() -> None:
    table = llfx.inspect(llfx.rewrite(two_layers(), llfx.IA3()))
    assert {role for row in table if row.adapters for role in row.roles} == {
        "key",
        "value",
        "reader",
        "down",
        "writer",
    }
    assert sum(bool(row.adapters) for row in table) == 6


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ({"target_names": ("query_proj",)}, ["target_names=('query_proj',)", "the nearest", "q_proj"]),
        ({"target_names": (r"mlp\.fc3$",)}, ["mlp", "the nearest", "fc1", "fc2"]),
        ({"target_roles": ("gate",)}, ["target_roles=('gate',)", "the first", "layers.0.self_attn"]),
        ({"layers": (7,)}, ["layers=(7,)"]),
        ({"exclude_names": (".",)}, ["exclude_names=('.',)"]),
        (
            {"layers": (1,), "target_names": ("lm_head",)},
            ["layers=(1,)", "target_names=('lm_head',)", "lm_head"],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_selection_of_nothing_names_the_nearest_sites_and_the_roles_found(
    targets: dict[str, Any], parts: list[str]
) -> None:
    with untouched(two_layers()), pytest.raises(llfx.SelectionError) as caught:
        llfx.rewrite(two_layers(), llfx.LoRA(r=2, **targets))
    roles = "down, head, key, output, query, reader, up, value, writer"
    for part in ["LoRA: no site matches", "13 sites", f"with the roles: {roles}.", *parts]:
        assert part in str(caught.value)
