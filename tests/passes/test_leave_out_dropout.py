"""`leave_out_dropout`: inference runs without dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    LeaveOutDropout,
)
from tests.support.conformance import randomise
from tests.support.programs import (
    after,
    count,
    reasons,
)

aten = torch.ops.aten


class AlwaysDrops(nn.Module):
    """A linear behind a dropout that drops in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.dropout(x, 0.5, training=True))
        return y


def test_dropout_that_follows_the_mode_is_left_out() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 5)).train()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, dropout=0.5, target_names=(".",)), (torch.ones(2, 6),)).eval()
    randomise(gm, 1)
    without, report = after(gm, LeaveOutDropout())
    assert (report.edits, reasons(report)) == (2, [])
    assert (count(gm, aten.dropout.default), count(without, aten.dropout.default)) == (2, 0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(without.eval()(x), gm(x))


def test_the_reason_is_that_a_dropout_does_not_follow_the_mode() -> None:
    gm = llfx.rewrite(AlwaysDrops(), llfx.LoRA(r=2, target_names=(".",)), (torch.ones(2, 6),))
    kept, report = after(gm, LeaveOutDropout())
    assert report.edits == 0
    assert [each.why for each in report.declined] == ["the dropout does not follow the mode"]
    assert count(kept, aten.dropout.default) == 1
