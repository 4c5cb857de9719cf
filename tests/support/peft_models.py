"""Models that PEFT's adapters and ours are compared on, captured once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_lite_fx as llfx

VOCABULARY = 37
START: dict[str, Any] = {"decoder_start_token_id": 0}
"""The start of decoding, which T5Config takes and does not declare."""


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 11), nn.Linear(11, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.fc2(F.gelu(self.fc1(x))))
        return y


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_inner=24,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
    )


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            **START,
            initializer_factor=1.5,
        )
    )


@dataclass(frozen=True)
class Case:
    """A model, with patterns of the whole names to adapt: by most variants, by IA3, by IA3 at the input."""

    build: Callable[[], nn.Module]
    every: str
    ia3: str
    feedforward: str
    size: float = 1
    """Of the values of matrices."""

    def inputs(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(shape[1])
        if self.build is ResidualMLP:
            return {"x": torch.randn(*shape, 7, generator=generator, dtype=torch.float64)}
        ids = torch.randint(3, VOCABULARY, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}


CASES = {
    "mlp": Case(ResidualMLP, r"fc1|fc2", r"fc1|fc2", r"fc2"),
    "llama": Case(llama, r".*\d\.(self_attn|mlp)\.\w+_proj", r".*\.(k|v|down)_proj", r".*\.down_proj"),
    "gpt2": Case(gpt2, r".*\.h\.\d\.(attn|mlp)\.c_\w+", r".*\.(c_attn|mlp\.c_proj)", r".*\.mlp\.c_proj"),
    "bert": Case(
        bert,
        r".*layer\.\d\..*(query|key|value|dense)",
        r".*layer\.\d\.(attention\.self\.(key|value)|output\.dense)",
        r".*layer\.\d\.output\.dense",
    ),
    "t5": Case(
        t5, r".*\.(q|k|v|o|wi_0|wi_1|wo)", r".*\.(k|v|wo)", r".*\.wo", size=0.3
    ),  # scores are not scaled: a softmax would saturate
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """Return a model in double precision and its graph, captured once: rewriting the graph is much faster."""
    case = CASES[name]
    torch.manual_seed(0)
    # Built and rounded in single precision, in which alone PEFT can start PiSSA and OLoRA.
    model = case.build().eval().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at zero, which hides how they are adapted
            parameter.data.add_(0.3 * torch.randn(parameter.shape)).data.copy_(parameter.float())
    with torch.random.fork_rng():
        return model, llfx.capture(model, case.inputs((3, 6)))


SIZES = {"r": 4, "block_size": 4, "group_size": 4, "mini_r": 2, "n_frequency": 6, "hybrid_r": 2}
SIZES |= {"vector_length": 4, "num_vectors": 6}


def small(cls: type[llfx.Variant], fields: Mapping[str, Any], **others: Any) -> llfx.Variant:
    """Return a config with these fields, of a size that fits a tiny model."""
    return cls(
        **{name: value for name, value in {**SIZES, **fields}.items() if name in cls.__dataclass_fields__}, **others
    )
