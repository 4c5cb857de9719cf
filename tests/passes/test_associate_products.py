"""`associate_products`: the small matrices of an adapter are multiplied first, where that leaves less to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    AssociateProducts,
)
from tests.support.conformance import randomise
from tests.support.programs import (
    after,
    in_calls,
    reasons,
)

T, IN, OUT, R, BLOCK = 256, 192, 160, 8, 8

aten = torch.ops.aten


def test_shared_bases_are_not_multiplied_into_a_matrix_for_each_site() -> None:
    cfg = llfx.RandLoRA(r=R, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),)).eval()
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 0
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), llfx.LoRA(r=128, target_names=(".",)), (torch.randn(3, IN),))
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 1


def test_two_products_become_one_with_a_matrix_of_parameters() -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.LoRA(r=4, target_names=(".",)), (torch.ones(2, 6),))
    randomise(gm, 1)
    associated, report = after(gm, AssociateProducts())
    assert (report.edits, reasons(report)) == (1, [])
    assert (in_calls(gm)[aten.linear.default], in_calls(associated)[aten.linear.default]) == (2, 1)
    assert (in_calls(gm)[aten.matmul.default], in_calls(associated)[aten.matmul.default]) == (0, 1)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(associated(x), gm(x))


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (llfx.LoRA(r=2), "two narrow products take less than one"),
        (llfx.RandLoRA(r=R), "all sites share a matrix"),
    ],
    ids=["narrow", "shared"],
)
def test_the_reason_is_the_cost(cfg: llfx.Variant, why: str) -> None:
    cfg = dataclasses.replace(cfg, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),))
    _, report = after(gm, AssociateProducts())
    assert report.edits == 0
    assert {each.why for each in report.declined} == {why}
