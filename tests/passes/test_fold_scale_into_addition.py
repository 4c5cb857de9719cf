"""`fold_scale_into_addition`: the addition of a branch scales it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    FoldScaleIntoAddition,
)
from tests.support.conformance import randomise
from tests.support.programs import (
    after,
    count,
    reasons,
)

aten = torch.ops.aten


def test_a_multiplication_becomes_a_factor_of_the_addition() -> None:
    gm = llfx.rewrite(
        nn.Sequential(nn.Linear(6, 5)), llfx.LoRA(r=2, alpha=8.0, target_names=(".",)), (torch.ones(2, 6),)
    )
    randomise(gm, 1)
    folded, report = after(gm, FoldScaleIntoAddition())
    assert (report.edits, reasons(report)) == (1, [])
    assert (count(gm, aten.mul.Tensor), count(folded, aten.mul.Tensor)) == (1, 0)
    assert [node.kwargs for node in folded.graph.nodes if node.target is aten.add.Tensor] == [{"alpha": 4.0}]
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(folded(x), gm(x)), "a power of two changes no bit"


def test_the_reason_is_that_terms_cancel_or_are_read_elsewhere() -> None:
    everywhere: dict[str, Any] = {"target_names": (".",)}
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.PiSSA(r=2, **everywhere), (torch.ones(2, 6),))
    folded, report = after(gm, FoldScaleIntoAddition())
    assert count(folded, aten.mul.Tensor) == count(gm, aten.mul.Tensor) == 2
    assert reasons(report) == ["0: both terms are scaled: rounded alike, they may cancel to the last bit"]
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.LoRA(r=2, **everywhere), (torch.ones(2, 6),))
    (scaled,) = [node for node in gm.graph.nodes if node.target is aten.mul.Tensor]
    with gm.graph.inserting_after(scaled):
        gm.graph.output_node().args = ((gm.graph.output_node().args[0], scaled),)
    _, report = after(gm, FoldScaleIntoAddition())
    assert (report.edits, reasons(report)) == (0, ["0: the scaled branch is read elsewhere too"])
