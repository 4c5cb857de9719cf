"""The pieces that layers run in: a graph that is cut into them computes what its model does, in the same order.

A graph without checkpointing is cut in the same way, so it is no measure for one with it; the model itself is.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from tests.execution.test_checkpointing import InPlace, Interleaved
from tests.support.models import WIDTH

X = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpoint_layers", [False, True])
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
