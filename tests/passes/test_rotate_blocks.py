"""`rotate_blocks`: OFT's rotation is one operation in training, and the plain ones in inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.ops.rotated_blocks import RotatedBlocks
from tests.support.conformance import randomise
from tests.support.selection import broad_after


class Siblings(nn.Module):
    """Two linears that read one input, which is a gate times a value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.gate(x).sigmoid() * self.gate(x)
        result: torch.Tensor = self.one(inner).tanh() + self.two(inner)
        return result


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    cfg = llfx.OFT(block_size=4, target_names=("one", "two"), **options)
    gm = llfx.rewrite(Siblings(), cfg, (torch.randn(3, 8, requires_grad=True),))
    randomise(gm, 0)
    return gm


def rotations(gm: Any, program: Any) -> list[RotatedBlocks]:
    targets = [node.target for node in llfx.program(gm, program).graph.nodes]
    return [target for target in targets if isinstance(target, RotatedBlocks)]


def assert_same_gradients(gm: Any, x: torch.Tensor) -> None:
    plain = llfx.optimize(gm, llfx.passes.Pipeline(()))
    parameters = [x, *llfx.adapter_parameters(gm)]
    ours, theirs = (torch.autograd.grad(model(x).square().sum(), parameters) for model in (gm, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "options", broad_after(1, [{}, {"block_share": True}, {"use_cayley_neumann": False}, {"coft": True}]), ids=str
)
def test_each_site_has_one_operation_in_training(options: dict[str, Any]) -> None:
    gm = adapted(**options)
    assert len(rotations(gm, "training")) == 2
    assert rotations(gm, "inference") == []
    assert_same_gradients(gm, torch.randn(5, 8, requires_grad=True))


def test_values_of_another_type_are_cast_before_it() -> None:
    gm = adapted(dtype=torch.float64)
    assert len(rotations(gm, "training")) == 2
    assert_same_gradients(gm, torch.randn(5, 8, requires_grad=True))


def test_inputs_that_follow_from_saved_values_are_not_saved() -> None:
    layer = nn.ModuleDict({"norm": nn.RMSNorm(16), "one": nn.Linear(16, 16)})

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = layer, nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layer["one"](self.layer["norm"](self.last(x)))
            return result

    torch.manual_seed(0)
    cfg = llfx.OFT(block_size=4, target_names=(".",))
    gm = llfx.rewrite(Normed(), cfg, (torch.randn(3, 16),))
    randomise(gm, 0)
    assert [operation.recipe is None for operation in rotations(gm, "training")] == [True, False]
    assert_same_gradients(gm, torch.randn(5, 16, requires_grad=True))


def test_its_memory_can_be_planned() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)))
    cfg = llfx.OFT(block_size=4, target_names=(".",))
    gm = llfx.rewrite(model, cfg, (torch.randn(3, 16),), memory="balanced")
    randomise(gm, 0)
    x = torch.randn(5, 16, requires_grad=True)
    for _ in range(2):
        assert_same_gradients(gm, x)
    assert [plan.reason for plan in llfx.memory_plan(gm)] == ["", ""]
