"""`follow_mode`: one graph computes what the model computes in either mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.errors import CaptureError
from lora_lite_fx.passes import (
    FollowMode,
)
from tests.support.programs import (
    after,
)
from tests.support.selection import broad_after

aten = torch.ops.aten

Compute = Callable[[Tensor, Tensor], Tensor]
UNLIKE = (torch.ones(3, 4), torch.ones(5, 4))
TWO = (torch.ones(3, 4), torch.full((3, 4), 2.0))


class Counts(nn.Module):
    """Writes to a buffer in training, by a number that is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(x.sum(0))
        return x + 1


def exported(model: nn.Module, training: bool) -> Any:
    return torch.export.export(model.train(training), (torch.ones(2, 4),)).module()


def test_the_flag_of_dropout_follows_the_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    in_training, in_evaluation = (exported(model, training) for training in (True, False))
    followed, report = after(in_training, FollowMode(in_evaluation.graph))
    assert report.edits == 1
    (dropout,) = followed.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert (dropout.args[2].op, dropout.args[2].target) == ("get_attr", "0.training")
    (before,) = in_training.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert before.args[2] is True


def test_other_writes_in_training_are_refused() -> None:
    in_training, in_evaluation = (exported(Counts(), training) for training in (True, False))
    with pytest.raises(CaptureError, match="other operations in training than in evaluation") as caught:
        after(in_training, FollowMode(in_evaluation.graph))
    assert "in pass follow_mode" in caught.value.__notes__[0]


class Modes(nn.Module):
    """Computes one function in training, and another one in evaluation."""

    def __init__(self, in_training: Compute, in_evaluation: Compute) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return (self.in_training if self.training else self.in_evaluation)(x, y)


DIFFERENT: dict[str, tuple[Compute, Compute]] = {
    "operands": (lambda x, y: x + y, lambda x, y: x + x),
    "options": (lambda x, y: F.gelu(x, approximate="tanh"), lambda x, y: F.gelu(x)),
    "lists": (lambda x, y: torch.cat([x, y]), lambda x, y: torch.cat([x, y, y])),
    "sizes": (lambda x, y: torch.arange(x.shape[0]), lambda x, y: torch.arange(y.shape[0])),
    "a dropout that is off": (lambda x, y: F.dropout(x, 0.5, False) + y, lambda x, y: x + y),
}


@pytest.mark.parametrize("case", broad_after(2, DIFFERENT))
def test_other_computations_in_each_mode_are_followed(case: str) -> None:
    modes, inputs = Modes(*DIFFERENT[case]), TWO if "operands" in case or "off" in case else UNLIKE
    gm = llfx.capture(modes, inputs)
    for training in (True, False):
        assert torch.equal(gm.train(training)(*inputs), modes.train(training)(*inputs))


def test_functions_that_are_the_same_in_both_modes_are_not_refused() -> None:
    for in_training, in_evaluation in DIFFERENT.values():
        for compute in (in_training, in_evaluation):
            gm = llfx.capture(Modes(compute, compute), TWO)
            torch.testing.assert_close(gm(*TWO), compute(*TWO))
