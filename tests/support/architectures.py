"""Small models of many architectures with tables of their roles, read off the papers and the model code by hand.

Here are the decoders; `architectures_others.py` has the rest. A table has a line `name  roles...` for each linear that
is a site. `reader` and `writer` stand for what reads and writes the residual stream; what the model code makes of a
linear beyond that, and none of the roles says, is noted beside the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A model class with a small config.

    Args:
        model: name of the class in transformers.
        config: the fields of its config.
        roles: the table.
        no_site: linears of the model that are no site, to the reason.
        unwrapped: sites to adapt that are no called module, so that `wrap` cannot wrap them, to the reason.
        fixed_length: why its graph takes inputs of no other length.
        fixed_batch: why its graph takes batches of no other size.
        dtype: float64 where the model runs in it: the products of experts do not.
    """

    model: str
    config: Mapping[str, Any]
    roles: str
    no_site: Mapping[str, str] = field(default_factory=dict)
    unwrapped: Mapping[str, str] = field(default_factory=dict)
    fixed_length: str = ""
    fixed_batch: str = ""
    dtype: torch.dtype = torch.float64

    def build(self) -> Any:
        """The model with random weights, in evaluation mode."""
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**self.config)
        config.use_cache = config.use_mems_eval = False
        return model_class(config).eval().to(self.dtype)

    def table(self) -> dict[str, set[str]]:
        """The roles of each site."""
        lines = [line.split() for line in self.roles.splitlines() if line.strip()]
        return {name: set(roles) for name, *roles in lines}

    def linears(self) -> set[str]:
        """The names of the model's linear modules."""
        kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
        return {name for name, module in self.build().named_modules() if isinstance(module, kinds)}


def under(prefix: str, *tables: str) -> str:
    """The lines of `tables`, with `prefix.` before the names."""
    lines = (line for table in tables for line in table.splitlines() if line.strip())
    return "".join(f"{prefix}.{line.strip()}\n" for line in lines)


SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**SMALL, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 8}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

HEAD = "lm_head head reader\n"
ATTENTION = """
q_proj query reader
k_proj key reader
v_proj value reader
o_proj output writer
"""
OUT_PROJ = ATTENTION.replace("o_proj", "out_proj")
SELF = under("self_attn", ATTENTION)
SELF_OUT = under("self_attn", OUT_PROJ)
GATED = """
gate_proj gate reader
up_proj up reader
down_proj down writer
"""
FC = """
fc1 up reader
fc2 down writer
"""
LAYER = SELF + under("mlp", GATED)
LLAMA = under("model.layers.0", LAYER) + HEAD

# GPT-2 and its descendants.
_NEOX = """
{0}.query_key_value query key value reader
{0}.dense output writer
mlp.dense_h_to_4h up reader
mlp.dense_4h_to_h down writer
"""
_C_FC = """
mlp.c_fc up reader
mlp.c_proj down writer
"""
GPT2_LAYER = f"""
attn.c_attn query key value reader
attn.c_proj output writer
{_C_FC}
"""
_FC_IN = """
mlp.fc_in up reader
mlp.fc_out down writer
"""
_GPT_NEO_LAYER = under("attn.attention", OUT_PROJ) + _C_FC

# Mixture of experts: the experts' weights are three-dimensional, and no sites.
_MIXTRAL = under("model.layers.0", SELF, "mlp.gate router reader") + HEAD

# The gate of the shared expert scales what the expert returns: it chooses nothing, and gates no input of a `down`.
_QWEN2_MOE = (
    under(
        "model.layers.0",
        SELF,
        "mlp.gate router reader",
        under("mlp.shared_expert", GATED),
        "mlp.shared_expert_gate reader",
    )
    + HEAD
)

# Latent attention: queries, and keys with values, through a low rank. The first factor reads the stream, the second
# does not; `kv_a_proj_with_mqa` is also the part of the keys that carries positions.
_LATENT = """
self_attn.q_a_proj query reader
self_attn.q_b_proj query inner
self_attn.kv_a_proj_with_mqa key value reader
self_attn.kv_b_proj key value inner
self_attn.o_proj output writer
"""
_DEEPSEEK = (
    under("model.layers.0", _LATENT, under("mlp", GATED))
    + under("model.layers.1", _LATENT, "mlp.gate router reader", under("mlp.shared_experts", GATED))
    + HEAD
)
_DEEPSEEK_CONFIG = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}

# A gated short convolution in place of attention: no role but reader and writer.
_LFM2 = (
    under(
        "model.layers.0",
        "conv.in_proj reader",
        "conv.out_proj writer",
        "feed_forward.w1 gate reader",
        "feed_forward.w3 up reader",
        "feed_forward.w2 down writer",
    )
    + under(
        "model.layers.1",
        SELF_OUT,
        "feed_forward.w1 gate reader",
        "feed_forward.w3 up reader",
        "feed_forward.w2 down writer",
    )
    + HEAD
)

# A gated state space model in place of attention: its output is activated, but a recurrence is no feed-forward block.
_MAMBA = """
in_proj reader
x_proj inner
out_proj writer
"""
_DT_PROJ = "it is `weight @ x`, with the inputs in the last dimension but one: no linear over the last"
_JAMBA = (
    under("model.layers.0", under("mamba", _MAMBA), under("feed_forward", GATED))
    + under("model.layers.1", SELF, "feed_forward.router router reader")
    + HEAD
)

_OPT = under("model.decoder.layers.0", SELF_OUT, FC) + HEAD
_XGLM = under("model.layers.0", SELF_OUT, FC) + HEAD

DECODERS: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _GROUPED, LLAMA),
    "llama-classifier": Architecture(
        "LlamaForSequenceClassification", {**_GROUPED, "num_labels": 3}, LLAMA.replace("lm_head", "score")
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _GROUPED, LLAMA),
    "qwen3": Architecture("Qwen3ForCausalLM", _WIDE, LLAMA),  # norms of queries and keys
    "mistral": Architecture("MistralForCausalLM", _GROUPED, LLAMA),
    "gemma": Architecture("GemmaForCausalLM", _WIDE, LLAMA),
    "gemma2": Architecture(  # soft-capped scores and logits, norms before and after
        "Gemma2ForCausalLM",
        {**_WIDE, "num_hidden_layers": 2},
        under("model.layers.0", LAYER) + under("model.layers.1", LAYER) + HEAD,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        {**_WIDE, **_SLIDING},
        under("model.layers.0", LAYER) + under("model.layers.1", LAYER) + HEAD,
    ),
    "phi": Architecture(  # attention and feed-forward in parallel
        "PhiForCausalLM",
        _GROUPED,
        under("model.layers.0", SELF.replace("o_proj", "dense"), under("mlp", FC)) + HEAD,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        _GROUPED,
        under(
            "model.layers.0",
            "self_attn.qkv_proj query key value reader",
            "self_attn.o_proj output writer",
            "mlp.gate_up_proj gate up reader",
            "mlp.down_proj down writer",
        )
        + HEAD,
    ),
    "gpt2": Architecture("GPT2LMHeadModel", _GPT2, under("transformer.h.0", GPT2_LAYER) + HEAD),
    "gpt_neo": Architecture(  # local attention in the second layer
        "GPTNeoForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
        },
        under("transformer.h.0", _GPT_NEO_LAYER) + under("transformer.h.1", _GPT_NEO_LAYER) + HEAD,
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", SMALL, under("gpt_neox.layers.0", _NEOX.format("attention")) + HEAD),
    "gptj": Architecture(
        "GPTJForCausalLM",
        {**_GPT2, "rotary_dim": 2},
        under("transformer.h.0", under("attn", OUT_PROJ), _FC_IN) + HEAD,
    ),
    "codegen": Architecture(
        "CodeGenForCausalLM",
        {**_GPT2, "n_ctx": 32, "rotary_dim": 2},
        under("transformer.h.0", "attn.qkv_proj query key value reader", "attn.out_proj output writer", _FC_IN) + HEAD,
    ),
    "gpt_bigcode": Architecture(  # one head of keys and values
        "GPTBigCodeForCausalLM", _GPT2, under("transformer.h.0", GPT2_LAYER) + HEAD
    ),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _GROUPED, under("model.layers.0", SELF, _C_FC) + HEAD),
    "opt": Architecture(
        "OPTForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
            "layerdrop": 0.0,
        },
        _OPT,
    ),
    "xglm": Architecture(
        "XGLMForCausalLM",
        {
            "vocab_size": 40,
            "d_model": 16,
            "ffn_dim": 24,
            "num_layers": 1,
            "attention_heads": 4,
            "max_position_embeddings": 32,
            "layerdrop": 0.0,
        },
        _XGLM,
        dtype=torch.float32,  # torch.export makes its least float64 a float32
    ),
    "bloom": Architecture(  # ALiBi, added by baddbmm
        "BloomForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 4},
        under("transformer.h.0", _NEOX.format("self_attention")) + HEAD,
    ),
    "falcon": Architecture(  # one head of keys and values, attention and feed-forward in parallel
        "FalconForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
        },
        under("transformer.h.0", _NEOX.format("self_attention")) + HEAD,
    ),
    "falcon-grouped": Architecture(
        "FalconForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        under("transformer.h.0", _NEOX.format("self_attention")) + HEAD,
    ),
    "mpt": Architecture(  # ALiBi, added to the mask
        "MptForCausalLM",
        {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 4, "max_seq_len": 32},
        under(
            "transformer.blocks.0",
            "attn.Wqkv query key value reader",
            "attn.out_proj output writer",
            "ffn.up_proj up reader",
            "ffn.down_proj down writer",
        )
        + HEAD,
    ),
    "stablelm": Architecture("StableLmForCausalLM", _GROUPED, LLAMA),
    "olmo2": Architecture("Olmo2ForCausalLM", _GROUPED, LLAMA),  # norms after, none before
    "granite": Architecture("GraniteForCausalLM", _GROUPED, LLAMA),
    "cohere": Architecture("CohereForCausalLM", _GROUPED, LLAMA),  # h + attention(h) + feed-forward(h)
    "glm4": Architecture(
        "Glm4ForCausalLM",
        {**_GROUPED, "head_dim": 4},
        under("model.layers.0", SELF, "mlp.gate_up_proj gate up reader", "mlp.down_proj down writer") + HEAD,
    ),
    "nemotron": Architecture(  # a squared ReLU
        "NemotronForCausalLM",
        _GROUPED,
        under("model.layers.0", SELF, "mlp.up_proj up reader", "mlp.down_proj down writer") + HEAD,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        _MIXTRAL,
        dtype=torch.float32,
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        {**_GROUPED, **_MOE, "shared_expert_intermediate_size": 20},
        _QWEN2_MOE,
        dtype=torch.float32,
    ),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", {**_WIDE, **_MOE}, _MIXTRAL, dtype=torch.float32),
    "olmoe": Architecture("OlmoeForCausalLM", {**_GROUPED, **_MOE}, _MIXTRAL, dtype=torch.float32),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        {**_DEEPSEEK_CONFIG, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        _DEEPSEEK,
        dtype=torch.float32,
    ),
    "deepseek_v3": Architecture(  # routed within groups
        "DeepseekV3ForCausalLM", {**_DEEPSEEK_CONFIG, "n_group": 2, "topk_group": 1}, _DEEPSEEK, dtype=torch.float32
    ),
    "gpt_oss": Architecture(  # sinks: one more score, without a value
        "GptOssForCausalLM",
        {**_GROUPED, **_SLIDING, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        under("model.layers.0", SELF, "mlp.router router reader")
        + under("model.layers.1", SELF, "mlp.router router reader")
        + HEAD,
        dtype=torch.float32,
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        {
            **_GROUPED,
            "head_dim": 4,
            "num_hidden_layers": 2,
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
        under("model.layers.0", SELF, under("feed_forward", GATED))
        + under("model.layers.1", SELF, "feed_forward.router router reader")
        + under("model.layers.1.feed_forward.shared_expert", GATED)
        + HEAD,
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        {
            **_GROUPED,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        _LFM2,
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        {
            **_GROUPED,
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        _JAMBA,
        no_site={"model.layers.0.mamba.dt_proj": _DT_PROJ},
        fixed_length="the recurrence is a loop over the tokens",
        dtype=torch.float32,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4},
        under("backbone.layers.0.mixer", _MAMBA) + HEAD,
        no_site={"backbone.layers.0.mixer.dt_proj": _DT_PROJ},
        fixed_length="the recurrence is a loop over the tokens",
    ),
}
