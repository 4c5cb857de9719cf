"""Convolutions under PEFT: of one to three dimensions, with strides and paddings, and in groups."""

from __future__ import annotations

import functools
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.peft_round_trip import round_trip
from tests.support.selection import broad_after

SHAPES = {"Conv1d": (2, 4, 7), "Conv2d": (2, 4, 6, 5), "Conv3d": (2, 4, 4, 5, 4)}


class Convolved(nn.Module):
    """A strided and padded convolution, and one in groups, of `dims` dimensions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        convolution = getattr(nn, name)
        self.plain = convolution(4, 6, 3, stride=2, padding=1)
        self.grouped = convolution(6, 4, 2, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.grouped(torch.tanh(self.plain(x)))
        return y


@functools.cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Convolved(name).eval()


def x_of(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))


LOHA, LOKR, IA3, HIRA, LORA = peft.LoHaConfig, peft.LoKrConfig, peft.IA3Config, peft.HiraConfig, peft.LoraConfig
BOTH, PLAIN = ["plain", "grouped"], ["plain"]
ROUND_TRIPS: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "LoHa 1": ("Conv1d", lambda: LOHA(r=2, target_modules=BOTH)),
    "LoHa 2": ("Conv2d", lambda: LOHA(r=3, target_modules=BOTH, use_effective_conv2d=True)),
    "LoKr 1": ("Conv1d", lambda: LOKR(r=8, target_modules=BOTH)),
    "LoKr 1 of low rank": ("Conv1d", lambda: LOKR(r=1, target_modules=BOTH, decompose_factor=1)),
    "LoKr 2 with a core": ("Conv2d", lambda: LOKR(r=1, target_modules=PLAIN, use_effective_conv2d=True)),
    "LoKr 2": ("Conv2d", lambda: LOKR(r=1, target_modules=BOTH, decompose_both=True)),
    "IA3 2": ("Conv2d", lambda: IA3(target_modules=BOTH, feedforward_modules=[])),
    "IA3 3, inputs": ("Conv3d", lambda: IA3(target_modules=BOTH, feedforward_modules=BOTH)),
    "HiRA 3": ("Conv3d", lambda: HIRA(r=2, target_modules=PLAIN)),
    "LoRA 3": ("Conv3d", lambda: LORA(r=2, target_modules=PLAIN)),
    "DoRA 3": ("Conv3d", lambda: LORA(r=2, target_modules=PLAIN, use_dora=True)),
    "HRA 2": ("Conv2d", lambda: peft.HRAConfig(r=2, target_modules=PLAIN)),
    "BOFT 2": ("Conv2d", lambda: peft.BOFTConfig(boft_block_size=6, target_modules=PLAIN)),
}


@pytest.mark.parametrize("case", broad_after(2, ROUND_TRIPS))
def test_what_peft_has_at_convolutions_goes_both_ways(case: str) -> None:
    name, config = ROUND_TRIPS[case]
    outcome = round_trip(model(name), config(), x_of(name))
    assert (outcome.read, outcome.written) == ("equal", "equal"), outcome.why
    assert outcome.trained in ("equal", "said")


REFUSED: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "LoRA in groups": (lambda: LORA(r=2, target_modules=["grouped"]), "'grouped' is a grouped convolution"),
    "OFT of patches": (lambda: peft.OFTConfig(oft_block_size=6, target_modules=PLAIN), "overlaps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_computes_otherwise_is_refused(case: str) -> None:
    config, part = REFUSED[case]
    outcome = round_trip(model("Conv2d"), config(), x_of("Conv2d"))
    assert outcome.read == "refused"
    assert part in outcome.why


def test_a_module_that_pads_otherwise_than_with_zeros_is_refused() -> None:
    circular = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")).eval()
    outcome = round_trip(circular, LORA(r=2, target_modules=["0"]), x_of("Conv1d"))
    assert outcome.read == "refused"
    assert "pads with zeros" in outcome.why


@functools.cache
def captured(name: str) -> fx.GraphModule:
    return llfx.capture(model(name), (x_of(name),))


GROUPED: list[tuple[str, llfx.Variant]] = [
    ("Conv2d", llfx.LoHa(r=4, target_kinds=("grouped_conv",))),
    ("Conv3d", llfx.LoKr(r=2, target_kinds=("grouped_conv",))),
    ("Conv3d", llfx.HiRA(r=4, target_kinds=("grouped_conv",))),
    ("Conv1d", llfx.IA3(target_kinds=("grouped_conv",), feedforward_names=("grouped",))),
    ("Conv2d", llfx.FourierFT(n_frequency=9, target_kinds=("grouped_conv",))),
    ("Conv1d", llfx.HRA(r=2, target_kinds=("conv",))),
    ("Conv3d", llfx.OFT(block_size=4, target_kinds=("conv",))),
]


@pytest.mark.parametrize(
    ("name", "variant"),
    broad_after(2, GROUPED, several=True),
    ids=[f"{name} {type(v).__name__}" for name, v in GROUPED],
)
def test_graph_wrapper_and_merged_weight_agree(name: str, variant: llfx.Variant) -> None:
    x, base = x_of(name), model(name)
    gm = llfx.rewrite(captured(name), variant).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    eager = llfx.wrap(base, variant).eval()
    llfx.load_adapter_state_dict(eager, llfx.adapter_state_dict(gm))
    other = torch.cat([x, 2 * x])
    assert not torch.allclose(gm(other), base(other), atol=1e-2)
    assert torch.allclose(gm(other), eager(other), atol=1e-5)
    assert torch.allclose(llfx.merge(gm)(other), eager(other), atol=1e-4)


def test_low_rank_factors_have_no_groups() -> None:
    with pytest.raises(llfx.ConfigError, match="'grouped', which is a grouped convolution: its factors"):
        llfx.rewrite(captured("Conv2d"), llfx.LoRA(r=4, target_kinds=("grouped_conv",)))
