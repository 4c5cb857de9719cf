"""Build small random models for property tests: every way a linear is written, non-square, with and without biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AlbertConfig, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.pytorch_utils import Conv1D

from lora_lite_fx.testing.models import VOCABULARY as VOCABULARY
from lora_lite_fx.testing.models import Attention as Attention
from lora_lite_fx.testing.models import FusedAttention as FusedAttention
from lora_lite_fx.testing.models import GatedMLP as GatedMLP
from lora_lite_fx.testing.models import Net as Net
from lora_lite_fx.testing.models import ResidualMLP as ResidualMLP
from lora_lite_fx.testing.models import SharedLinear as SharedLinear
from lora_lite_fx.testing.models import ids as ids

WIDTH, INNER = 8, 12  # with the vocabulary, no two are equal, and small blocks and groups divide them all


class Conv1DMLP(nn.Module):
    """GPT-2's layers: weights stored as (in, out)."""

    def __init__(self, bias: bool, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.c_fc = Conv1D(inner, width)
        self.c_proj = Conv1D(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(torch.relu(self.c_fc(x)))
        return x + y


class Chain(nn.Module):
    """Linears that read each other's output directly; the first runs twice."""

    def __init__(self, bias: bool, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.one = nn.Linear(width, width, bias)
        self.two = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(self.one(x)))
        return y


class Normed(nn.Module):
    """Batch norm, which follows the mode and keeps statistics."""

    def __init__(self, bias: bool, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        # Not norm(lin(x)): that does not depend on the scale of a gate, whose gradient would be rounding alone. And not
        # the norm alone: its layout in memory differs between eager and captured, and with it what dropout drops next.
        y: Tensor = self.norm((x + self.lin(x)).transpose(1, 2))
        return x + y.transpose(1, 2)


BLOCKS = (ResidualMLP, GatedMLP, Conv1DMLP, Attention, FusedAttention, SharedLinear, Chain, Normed)


def net(*blocks: type[nn.Module], bias: bool = True, tied: bool = False) -> Net:
    """Return a `Net` of these blocks, with the same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return Net(list(blocks), bias, tied).eval()


def double_net(*blocks: type[nn.Module], bias: bool = True, tied: bool = False) -> Net:
    """Return `net(...)` in double precision."""
    return net(*blocks, bias=bias, tied=tied).double()


@dataclass(frozen=True)
class Case:
    """A model to be built, and how it is captured."""

    blocks: tuple[type[nn.Module], ...]
    bias: bool
    tied: bool
    dtype: torch.dtype
    exported: bool
    seed: int

    def build(self) -> Net:
        torch.manual_seed(self.seed)
        return Net(list(self.blocks), self.bias, self.tied).to(self.dtype).eval()

    @property
    def example_inputs(self) -> tuple[Tensor, ...] | None:
        return (ids(2, 5),) if self.exported else None

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype == torch.float64 else 1e-5


def tiny_llama(**changes: Any) -> LlamaConfig:
    """Return the config of a Llama of one layer, with `changes`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 99}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})


def tiny_t5(**changes: Any) -> T5Config:
    """Return the config of a T5 of one layer, with `changes`."""
    fields: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return T5Config(**{**fields, "decoder_start_token_id": 0, **changes})


def tiny_albert(dropout: float, **changes: Any) -> AlbertConfig:
    """Return the config of an ALBERT whose one layer runs three times, with `changes`."""
    fields: dict[str, Any] = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_hidden_layers": 3}
    dropped = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return AlbertConfig(**{**fields, "num_attention_heads": 4, **dropped, **changes})


cases = st.builds(
    Case,
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3).map(tuple),
    bias=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    exported=st.booleans(),
    seed=st.integers(0, 999),
)


def one_layer_llama() -> Any:
    """Return a causal language model that is captured fast: one layer of width 16."""
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
