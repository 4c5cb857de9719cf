"""Random numbers of a forward: drawn anew in each call of the graph, or by nobody."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx


class Idle(nn.Linear):
    """Draws a number for each layer before it looks how often layers are dropped, as MusicGen does."""

    layerdrop = 0.0

    def forward(self, input: Tensor) -> Tensor:
        dropped = random.uniform(0, 1)
        return input if self.training and dropped < self.layerdrop else super().forward(input)


class Scaled(Idle):
    """Uses such a number otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * random.uniform(0, 1)


class Often(Idle):
    """Compares such a number with more than zero."""

    def forward(self, input: Tensor) -> Tensor:
        return input if random.uniform(0, 1) < 0.5 else super().forward(input)


class Noise(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + torch.randn((input.shape[0], 4), generator=None))


def test_layers_that_are_never_dropped_draw_nothing() -> None:
    model, x = Idle(4, 4), torch.randn(3, 4)
    gm = llfx.capture(model, (x,))
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Scaled(4, 4), r"could not be captured.*at `.*random.uniform"), (Often(4, 4), "draws numbers")],
)
def test_a_number_of_such_a_module_that_is_used_otherwise_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(llfx.CaptureError, match=message):
        llfx.capture(model, (torch.randn(3, 4),))


def test_noise_of_no_generator_is_drawn_in_each_call() -> None:
    model, x = Noise(4, 4), torch.randn(3, 4)
    gm = llfx.capture(model, (x,))
    for rows in (x, x[:2]):
        torch.manual_seed(0)
        expected = model(rows)
        torch.manual_seed(0)
        torch.testing.assert_close(gm(rows), expected)
    assert not torch.equal(gm(x), gm(x))


class DrawsUnlessTraced(nn.Module):
    """Draws a number that nobody reads, but for captures: model and graph draw their others in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            torch.rand(())
        return nn.functional.dropout(self.fc(x), 0.5, self.training)


def test_a_graph_that_draws_in_another_order_equals_its_model() -> None:
    model, x = DrawsUnlessTraced(), torch.randn(3, 8)
    gm = llfx.capture(model, (x,))
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))


def test_a_graph_that_drops_otherwise_is_refused() -> None:
    class DropsOtherwise(DrawsUnlessTraced):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.compiler.is_compiling() else super().forward(x.flip(0)).flip(0)

    with pytest.raises(llfx.CaptureError, match="in training"):
        llfx.capture(DropsOtherwise(), (torch.randn(3, 8),))
