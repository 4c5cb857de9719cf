"""A small Llama with adapters, made by either front door, with the eager wrapper beside it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.models import tiny_llama
from tests.support.selection import broad_after

TOKENS = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 3) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=layers, vocab_size=40)).double()


FRONT_ENDS: dict[str, Any] = {"rewrite": llfx.rewrite, "adapt": llfx.adapt}
front_ends = pytest.mark.parametrize("front_end", broad_after(1, FRONT_ENDS))


@functools.cache
def captured(layers: int) -> tuple[Any, Any]:
    base = llama(layers)
    return base, llfx.capture(base)


def made(front_end: str, cfg: llfx.Variant, layers: int = 3) -> tuple[Any, Any]:
    """Return the adapted model and the eager wrapper, with the same random adapters, in evaluation mode."""
    base, graph = captured(layers)
    model, wrapper = FRONT_ENDS[front_end](graph if front_end == "rewrite" else base, cfg), llfx.wrap(graph, cfg)
    randomise(model, 1)
    llfx.load_adapter_state_dict(wrapper, llfx.adapter_state_dict(model))
    return model.eval(), wrapper.eval()


def logits(model: Any, **kwargs: Any) -> Tensor:
    result: Tensor = model(input_ids=TOKENS, **kwargs).logits
    return result
