"""A base that calls `torch.vmap` is adapted inside and outside of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import check_rewrite_equals_wrap, close, output, small


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.b = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.vmap(torch.dot)(x[0], x[1])
        y: Tensor = self.b(torch.tanh(torch.vmap(self.a)(x)))
        return y + norms[:, None]


@pytest.mark.parametrize("cls", [llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.OFT, llfx.HRA])
def test_levels_of_vmap_stay_in_the_graph(cls: type[llfx.Variant]) -> None:
    torch.manual_seed(0)
    model = Mapped().double()
    x, other = (torch.randn(*shape, 8, dtype=torch.float64) for shape in ((2, 5), (3, 4)))
    graph = llfx.capture(model, (x,))
    cfg = small(cls, target_names=(".",))
    gm, wrapped = llfx.rewrite(graph, cfg), llfx.wrap(graph, cfg)
    check_rewrite_equals_wrap(model, gm, wrapped, (other,), 1e-10, seed=1)
    close(output(llfx.merge(gm), (other,)), output(gm, (other,)).detach(), 1e-10, "merged")
    close(output(llfx.remove(gm), (other,)), output(model, (other,)).detach(), 1e-12, "removed")
