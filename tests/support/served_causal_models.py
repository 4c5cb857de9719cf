"""Tiny causal language models of several architectures, with large random weights, to be served elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
IDS = [3, 17, 45, 2, 9, 9, 81, 60, 4, 5, 11]


@dataclass(frozen=True)
class Causal:
    """A tiny model.

    Args:
        make: of its class, with the config.
        adds_one: whether its norms multiply by one more than their weight.
    """

    make: Callable[[], Any]
    adds_one: bool = False


_TIED: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "tie_word_embeddings": True,
}
_EAGER: dict[str, Any] = {"attn_implementation": "eager"}  # which caps the scores
CAUSAL = {
    "llama": Causal(lambda: LlamaForCausalLM(LlamaConfig(**SIZES))),
    "mistral": Causal(lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=None))),
    "qwen2": Causal(lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "qwen3": Causal(lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))),
    "gemma2": Causal(lambda: Gemma2ForCausalLM(Gemma2Config(**_TIED, **_EAGER)), adds_one=True),
    "gemma3_text": Causal(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_TIED)), adds_one=True),
    "phi3": Causal(lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0))),
}
"""By the `model_type` of their config."""


def causal(kind: str) -> Any:
    """Return a tiny model in evaluation, whose logits differ by several units from text to text."""
    torch.manual_seed(0)
    model = CAUSAL[kind].make().eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name
        torch.nn.init.normal_(parameter, std=0.02 if is_norm else 0.15)
        if is_norm and not CAUSAL[kind].adds_one:
            parameter.data += 1
    return model


def logits(model: Any, ids: list[int] = IDS) -> Tensor:
    """Return the logits `(tokens, vocabulary)` of a text by torch."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


def tensors_at_random(model: Any, seed: int = 1, std: float = 0.2) -> None:
    """Give the adapters of a model random values."""
    import lora_lite_fx as llfx

    generator = torch.Generator().manual_seed(seed)
    for parameter in llfx.adapter_parameters(model):
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
