"""Functions of torch in a graph that is traced without inputs, as the operators that they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.support.conformance import randomise, small
from tests.support.selection import broad_after

SETTINGS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "numbers by position": ((None, 2, 1), {}),
    "a number by name": ((), {"stride": 2}),
    "a word": ((), {"padding": "same", "dilation": 2}),
    "a word and a number by position": ((None, 1, "valid", 2), {}),
    "the kernel's groups": ((), {"padding": 1, "groups": 2}),
}


class Convolved(nn.Module):
    """A convolution as a function, whose weight is a parameter."""

    def __init__(self, dims: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = getattr(F, f"conv{dims}d"), args, kwargs
        self.weight = nn.Parameter(torch.randn(4, 4 // kwargs.get("groups", 1), *[3] * dims) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(torch.tanh(x), self.weight, *self.args, **self.kwargs)
        return y


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("dims", broad_after(1, [1, 2, 3]))
def test_a_convolution_takes_one_number_for_all_dimensions(dims: int, what: str) -> None:
    model = Convolved(dims, *SETTINGS[what]).double()
    x = torch.randn(2, 4, *[8] * dims).double()
    gm = llfx.rewrite(model, llfx.LoHa(r=2, target_kinds=("conv", "grouped_conv")))
    assert torch.equal(gm(x), model(x)), "the start"
    randomise(gm, 0)
    assert (gm(x) - model(x)).abs().max() > 0.1
    close(llfx.merge(gm)(x), gm(x), 1e-9, "merged")


@pytest.mark.parametrize("cls", broad_after(2, [llfx.LoRA, llfx.LoHa, llfx.RoAd, llfx.IA3]))
def test_a_convolution_reads_an_adapted_linear_whose_shape_is_not_known(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3)).double()
    x = torch.randn(2, 4, 8).double()
    cfg = small(cls, 2, target_names=("0", "1"), target_kinds=("linear", "conv"))
    gm = llfx.rewrite(model, cfg)
    randomise(gm, 0)
    wrapped = llfx.wrap(model, cfg)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    close(gm(x), wrapped(x), 1e-9, "the wrapper")
    assert (gm(x) - model(x)).abs().max() > 0.01
