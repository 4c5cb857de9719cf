"""Tiny Llamas as folders for OpenVINO GenAI's `LLMPipeline`, made as optimum makes them: traced, with a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer


class _Step(nn.Module):
    """A step of a model of two layers whose cache is plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        beam_idx: Tensor,
        key_0: Tensor,
        value_0: Tensor,
        key_1: Tensor,
        value_1: Tensor,
    ) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache()
        for keys, values in ((key_0, value_0), (key_1, value_1)):
            layer: Any = DynamicLayer()
            layer.keys, layer.values = keys.index_select(0, beam_idx), values.index_select(0, beam_idx)
            layer.is_initialized, layer.dtype, layer.device = True, keys.dtype, keys.device
            cache.layers.append(layer)
        past, length = key_0.shape[2], input_ids.shape[1]
        before = torch.arange(past + length)[None] <= torch.arange(length)[:, None] + past
        allowed = before[None, None] & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
        state = self.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (self.lm_head(state.last_hidden_state), *kept)


def write_pipeline(model: Any, folder: Path) -> None:
    """Write a Llama of two layers, and a tokenizer that the pipeline wants, into a folder."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation
    from openvino_tokenizers import convert_tokenizer

    config = model.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    model.set_attn_implementation("eager")  # because the other one asks for sizes, which a trace makes constants
    batch, past, length = 2, 3, 4
    caches = {
        f"{kind}_{layer}": torch.randn(batch, heads, past, width) for layer in (0, 1) for kind in ("key", "value")
    }
    example = {
        "input_ids": torch.randint(0, config.vocab_size, (batch, length)),
        "attention_mask": torch.ones(batch, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).repeat(batch, 1),
        "beam_idx": torch.arange(batch, dtype=torch.int32),
        **caches,
    }
    with torch.no_grad():
        converted: Any = openvino.convert_model(_Step(model).eval(), example_input=example)
    for node, name in zip(converted.inputs, example, strict=True):
        node.get_node().set_friendly_name(name)
        node.get_tensor().set_names({name})
    for node, name in zip(converted.outputs, ("logits", *(f"present_{name}" for name in caches)), strict=True):
        node.get_tensor().set_names({name})
    text = {name: [-1] * tensor.dim() for name, tensor in example.items() if name not in caches}
    converted.reshape(text | {name: [-1, heads, -1, width] for name in caches})
    apply_make_stateful_transformation(converted, {name: f"present_{name}" for name in caches})
    _start_empty(converted, heads, width)
    openvino.save_model(converted, folder / "openvino_model.xml", compress_to_fp16=False)
    tokenizer, detokenizer = convert_tokenizer(_letters(), with_detokenizer=True)
    openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, folder / "openvino_detokenizer.xml")


def _start_empty(converted: Any, heads: int, width: int) -> None:
    """Let the cache be empty before the first step."""
    from openvino import opset13 as op

    ids = converted.input("input_ids").get_node()
    batch = op.gather(op.shape_of(ids, output_type="i64"), op.constant([0]), op.constant(0))
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = op.concat([batch, op.constant(np.array([heads, 0, width], dtype=np.int64))], axis=0)
            node.set_arguments([op.broadcast(op.constant(0.0, dtype=np.float32), sizes).output(0)])
    converted.validate_nodes_and_infer_types()


def _letters() -> Any:
    """Return a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    letters: Any = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("a", "b")]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="z")
