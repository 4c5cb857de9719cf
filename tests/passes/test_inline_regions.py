"""`inline_regions`: the nodes of regions with another mode stand in the graph itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_fx.passes import (
    InlineRegions,
)
from tests.support.programs import (
    after,
    count,
)

aten = torch.ops.aten


class Regions(nn.Module):
    """A linear under no_grad, and a region without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.fc(x)
        z = x + y
        with torch.no_grad():
            scale = torch.cos(y)
        return z * scale


def test_regions_of_autograd_are_opened() -> None:
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    model = Regions()
    gm = torch.export.export(model, (torch.ones(2, 4),)).module()
    inlined, report = after(gm, InlineRegions())
    assert report.edits == 2
    assert (count(gm, region), count(inlined, region)) == (2, 0)
    assert (count(gm, aten.linear.default), count(inlined, aten.linear.default)) == (0, 1)
    x = torch.randn(2, 4, requires_grad=True)
    for run in (gm, inlined):
        y = run(x)
        torch.testing.assert_close(y, model(x))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(model(x).sum(), x))
