"""`follow_mode`: one graph computes what the model computes in either mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lite_fx.errors import CaptureError
from lora_lite_fx.passes import (
    FollowMode,
)
from tests.support.programs import (
    after,
)

aten = torch.ops.aten


class Jitters(nn.Module):
    """Adds noise in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x) if self.training else x


def exported(model: nn.Module, training: bool) -> Any:
    return torch.export.export(model.train(training), (torch.ones(2, 4),)).module()


def test_the_flag_of_dropout_follows_the_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    in_training, in_evaluation = (exported(model, training) for training in (True, False))
    followed, report = after(in_training, FollowMode(in_evaluation.graph))
    assert report.edits == 1
    (dropout,) = followed.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert (dropout.args[2].op, dropout.args[2].target) == ("get_attr", "training")
    (before,) = in_training.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert before.args[2] is True


def test_other_operations_in_training_are_refused() -> None:
    in_training, in_evaluation = (exported(Jitters(), training) for training in (True, False))
    with pytest.raises(CaptureError, match="other operations in training than in evaluation") as caught:
        after(in_training, FollowMode(in_evaluation.graph))
    assert "in pass follow_mode" in caught.value.__notes__[0]
