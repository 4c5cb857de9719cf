"""The pieces that layers run in: a graph that is cut into them computes what its model does, in the same order.

A graph without checkpointing is cut in the same way, so it is no measure for one with it; the model itself is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.execution.test_checkpointing import InPlace, Interleaved, Layer, assert_same, checkpointed, step
from tests.support.conformance import randomise
from tests.support.models import WIDTH
from tests.support.selection import broad_after

X = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpoint_layers", broad_after(1, [False, True]))
@pytest.mark.parametrize(
    "model",
    [Interleaved(), InPlace(writes_input=True), InPlace(writes_input=False)],
    ids=lambda model: type(model).__name__,
)
def test_a_graph_that_is_cut_computes_what_the_model_does(model: nn.Module, checkpoint_layers: bool) -> None:
    gm = llfx.capture(model.train(), (X,), checkpoint_layers=checkpoint_layers)
    for seed in range(3):
        results = []
        for run in (model, gm):
            torch.manual_seed(seed)
            results.append(run(X.clone()))
        torch.testing.assert_close(results[1], results[0])


class Halves(Layer):
    """A layer that writes to a part of a tensor which an earlier layer has read."""

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        if read is not None:
            read[:2].mul_(0.5)
        return super().forward(x)


class ThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Halves(writes_input=False) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        first, second = self.layers
        x = x * 2
        return second(first(x), x)


def test_what_is_overwritten_through_a_view_is_not_read_again() -> None:
    plain = llfx.rewrite(ThroughAView(), llfx.LoRA(r=2, target_names=(".",)), (X,)).train()
    randomise(plain, 1)
    assert_same(step(checkpointed(plain), (X.clone(),)), step(plain, (X.clone(),)))
