"""Adapters that PEFT holds in other modules than we do: attention modules, parameters, stacks of experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.peft_round_trip import EQUAL, round_trip
from tests.support.selection import broad_after, slow_after

WIDTH = 8


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x, x.flip(1), x + 1, need_weights=False)[0])
        return y


class Multiplied(nn.Module):
    """A product with a parameter, stored with the inputs first."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def attended() -> nn.Module:
    torch.manual_seed(0)
    return Attended().eval()


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.broad
def test_an_attention_module_goes_both_ways() -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attention", "head"])
    outcome = round_trip(attended(), config, x_of(2, 5, WIDTH))
    assert (outcome.read, outcome.written) == ("equal", "equal"), outcome.why


@pytest.mark.parametrize("targets", broad_after(1, [("in_proj", "out_proj"), ("rows_0_8",), ("out_proj",)]))
def test_factors_of_each_projection_are_written_as_those_of_the_whole(targets: tuple[str, ...], tmp_path: Path) -> None:
    model, x = attended(), x_of(2, 5, WIDTH)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, alpha=3, target_names=targets), (x,)).eval()
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            parameter.add_(0.1 * len(parameter))
        for name, tensor in llfx.adapter_state_dict(gm).items():
            tensor.add_(0.01 * len(name))
    llfx.save_peft(gm, tmp_path)
    theirs = peft.PeftModel.from_pretrained(attended(), tmp_path).eval()
    assert not torch.allclose(gm(x), model(x), atol=1e-2)
    assert torch.allclose(theirs(x), gm(x), atol=1e-5)
    again = llfx.load_peft(attended(), tmp_path, (x,)).eval()
    assert torch.allclose(again(x), gm(x), atol=1e-5)


def test_a_parameter_goes_both_ways() -> None:
    model = nn.Sequential(Multiplied(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    config = peft.LoraConfig(
        r=2,
        target_modules=["2"],
        target_parameters=["0.weight"],
        rank_pattern={"0.weight": 3},
        alpha_pattern={"0.weight": 7},
    )
    assert round_trip(model, config, x_of(5, 4)) == EQUAL


@pytest.mark.parametrize(
    "config",
    broad_after(
        1,
        [
            peft.C3AConfig(block_size=4, block_size_pattern={"2": 2}, target_modules=["0", "2"]),
            peft.FourierFTConfig(n_frequency=9, n_frequency_pattern={"2": 5}, target_modules=["0", "2"]),
        ],
    ),
    ids=["C3A", "FourierFT"],
)
def test_sizes_by_name_go_both_ways(config: peft.PeftConfig) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    assert round_trip(model, config, x_of(5, 4)) == EQUAL


SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


class Logits(nn.Module):
    """A causal language model as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def with_experts(stored: str) -> nn.Module:
    torch.manual_seed(0)
    if stored == "outputs first":
        config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=4, decoder_sparse_step=1)
        model: Any = Qwen3MoeForCausalLM(config)
    else:
        model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4))
    model.set_experts_implementation("grouped_mm")
    return Logits(model.eval())


@pytest.mark.parametrize("stored", broad_after(1, ["outputs first", "inputs first"]))
def test_experts_go_both_ways(stored: str) -> None:
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    ids = torch.arange(12).view(2, 6)
    assert round_trip(with_experts(stored), lora, ids) == EQUAL


@pytest.mark.broad
@pytest.mark.parametrize("cls", slow_after(1, [llfx.PiSSA, llfx.LoRAXS]))
def test_a_start_from_the_weights_of_experts_is_written_as_a_lora(cls: Any, tmp_path: Path) -> None:
    model, ids = with_experts("outputs first"), torch.arange(12).view(2, 6)
    cfg = cls(r=7, target_names=r"experts\.", target_kinds="experts")  # more than half of a side
    gm = llfx.rewrite(model, cfg, (ids,)).eval()
    randomise(gm, 0)
    llfx.save_peft(gm, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.allclose(theirs(ids), gm(ids), atol=1e-4)
    assert not torch.allclose(gm(ids), model(ids), atol=1e-2)
    assert torch.allclose(llfx.load_peft(model, tmp_path, (ids,)).eval()(ids), gm(ids), atol=1e-4)
