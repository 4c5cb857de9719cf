"""`backward_pass.py` computes the gradients of torch's engine, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.devices.backward_pass import gradients_of
from tests.devices.fake_cuda import rewritten
from tests.support.selection import broad_after


@pytest.mark.parametrize("options", broad_after(1, [{"fuse_loss": True}, {}, {"checkpoint_layers": True}]), ids=str)
def test_gradients_are_those_of_the_engine(options: dict[str, Any]) -> None:
    gm, inputs = rewritten("DoRA", torch.float32, **options)
    gradients = gradients_of(gm.train()(**inputs).loss)
    gm(**inputs).loss.backward()
    assert {id(leaf) for leaf, _ in gradients} == {id(p) for p in gm.parameters() if p.grad is not None}
    for leaf, gradient in gradients:
        assert leaf.grad is not None
        assert torch.equal(gradient, leaf.grad)
