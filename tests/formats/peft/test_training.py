"""What PEFT trains is trained here in the same way, or reading its file warns that it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.peft_round_trip import EQUAL, Outcome, round_trip
from tests.support.selection import broad_after

WIDTH = 8


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x.flip(1), x + 1, need_weights=False)[0]
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 4))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 2 * 2, 4))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], peft.PeftConfig]]
OTHERWISE: dict[str, Case] = {
    "VeLoRA": (
        mlp,
        (2, WIDTH),
        lambda: peft.LoraConfig(r=2, target_modules=["0"], velora_config=peft.VeloraConfig(num_groups=1)),
    ),
    "MiCA": (mlp, (2, WIDTH), lambda: peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica")),
    "constrained OFT": (
        mlp,
        (2, WIDTH),
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["0"], coft=True, eps=1e-2),
    ),
    "an attention module": (Attended, (2, 5, WIDTH), lambda: peft.LoraConfig(r=2, target_modules=["attention"])),
    "LoHa at convolutions": (
        convolution,
        (2, 3, 4, 4),
        lambda: peft.LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=True),
    ),
}
ALIKE: dict[str, Case] = {
    "LoRA": (mlp, (2, WIDTH), lambda: peft.LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5)),
    "LoHa at linears": (mlp, (2, WIDTH), lambda: peft.LoHaConfig(r=2, target_modules=["0"])),
    "LoKr at convolutions": (
        convolution,
        (2, 3, 4, 4),
        lambda: peft.LoKrConfig(r=2, target_modules=["0"], use_effective_conv2d=True),
    ),
}


def outcome_of(case: Case) -> Outcome:
    build, shape, config = case
    torch.manual_seed(0)
    return round_trip(build().eval(), config(), torch.randn(shape))


@pytest.mark.parametrize("name", broad_after(2, ALIKE))
def test_a_step_changes_the_tensors_of_both_files_alike(name: str) -> None:
    assert outcome_of(ALIKE[name]) == EQUAL


@pytest.mark.parametrize("name", OTHERWISE)
def test_an_adapter_that_trains_otherwise_is_warned_of(name: str) -> None:
    outcome = outcome_of(OTHERWISE[name])
    assert (outcome.read, outcome.written, outcome.trained) == ("equal", "equal", "said"), outcome.why


def test_an_adapter_that_trains_alike_is_not_warned_of(tmp_path: Path) -> None:
    peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trains otherwise")
        llfx.load_peft(mlp(), tmp_path)
