"""A small Llama with low-rank adapters: two layers with norms, gates and grouped attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.ops.low_rank_products import LowRankProducts
from lora_lite_fx.passes import OPTIMIZATIONS
from tests.support.conformance import randomise

TRAINING = OPTIMIZATIONS.of("training")


EVERYWHERE: dict[str, Any] = {"target_names": ("_proj$",)}


LOW_RANK = {
    "LoRA": llfx.LoRA(r=2, alpha=4.0, **EVERYWHERE),
    "DoRA": llfx.DoRA(r=2, alpha=4.0, **EVERYWHERE),
    "DeLoRA": llfx.DeLoRA(r=2, **EVERYWHERE),
    "HRA": llfx.HRA(r=2, **EVERYWHERE),
}


def tokens(*shape: int, seed: int = 0) -> dict[str, Any]:
    return {"input_ids": torch.randint(64, shape, generator=torch.Generator().manual_seed(seed)), "use_cache": False}


@functools.cache
def llama(dtype: torch.dtype = torch.float64, bias: bool = False) -> tuple[Any, fx.GraphModule]:
    """Return two layers with norms, gates and grouped attention, and their graph."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=bias, mlp_bias=bias))
    model.to(dtype)
    return model, llfx.capture(model, tokens(2, 5))


def adapted_llama(name: str, **which: Any) -> fx.GraphModule:
    gm = llfx.rewrite(llama(**which)[1], LOW_RANK[name]).train()
    randomise(gm, 1)
    return gm


def gathered(gm: fx.GraphModule) -> list[Any]:
    return [node for node in gm.graph.nodes if isinstance(node.target, LowRankProducts)]


def run(model: nn.Module, *shape: int) -> Callable[..., Tensor]:
    return lambda: model(**tokens(*shape)).logits
