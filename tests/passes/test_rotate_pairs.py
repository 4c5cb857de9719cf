"""`rotate_pairs`: RoAd's rotation is one operation in training, and the plain ones in inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.ops.rotated_pairs import rotated_pairs
from tests.support.conformance import randomise
from tests.support.selection import broad_after

SITES = 2


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(self.one(x).tanh())
        return y


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    gm = llfx.rewrite(Two(), llfx.RoAd(group_size=8, target_names=(".",), **options), (torch.randn(3, 8),))
    randomise(gm, 0)
    return gm


def rotations(gm: Any, program: Any) -> int:
    return sum(node.target is rotated_pairs for node in llfx.program(gm, program).graph.nodes)


@pytest.mark.parametrize("kind", broad_after(1, ["road_1", "road_2", "road_4"]))
def test_each_site_has_one_operation_in_training(kind: str) -> None:
    gm = adapted(kind=kind)
    assert rotations(gm, "training") == SITES
    assert rotations(gm, "inference") == 0
    x = torch.randn(5, 8, requires_grad=True)
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    parameters = [x, *llfx.adapter_parameters(gm)]
    ours, theirs = (torch.autograd.grad(model(x).square().sum(), parameters) for model in (gm, plain))
    torch.testing.assert_close(ours, theirs)


def test_values_of_another_type_are_left_alone() -> None:
    gm = adapted(dtype=torch.float64)
    program = llfx.program(gm, "training")
    assert rotations(gm, "training") == 0
    (report,) = [each for each in program.meta["report"].passes if each.name == "rotate_pairs"]
    assert [declined.why for declined in report.declined] == ["its terms are of several types"] * SITES


def test_its_memory_can_be_planned() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)))
    gm = llfx.rewrite(model, llfx.RoAd(group_size=8, target_names=(".",)), (torch.randn(3, 16),), memory="balanced")
    randomise(gm, 0)
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    x = torch.randn(5, 16, requires_grad=True)
    for _ in range(2):
        parameters = [x, *llfx.adapter_parameters(gm)]
        ours, theirs = (torch.autograd.grad(each(x).square().sum(), parameters) for each in (gm, plain))
        torch.testing.assert_close(ours, theirs)
    assert [plan.reason for plan in llfx.memory_plan(gm)] == [""]
