"""Models that ask whether a tensor has a gradient, and hooks on tensors: refused where the result hangs on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.between(self.a(x)))
        return result

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Asks(Layers):
    def between(self, y: Tensor) -> Tensor:
        return 2 * y if y.requires_grad else y


class AsksLeaf(Layers):
    def between(self, y: Tensor) -> Tensor:
        return y if y.is_leaf else 2 * y


class AsksOrigin(Layers):
    def between(self, y: Tensor) -> Tensor:
        return 2 * y if y.grad_fn is not None else y


class Hooks(Layers):
    def between(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y


class AsksInVain(Layers):
    def between(self, y: Tensor) -> Tensor:
        return y.mul(2) if y.requires_grad and not self.a.weight.requires_grad else 2 * y


@pytest.mark.parametrize("kind", [Asks, AsksLeaf, AsksOrigin])
def test_a_model_that_computes_otherwise_with_gradients_is_refused(kind: Any) -> None:
    with pytest.raises(llfx.CaptureError, match="differs from the model"):
        llfx.capture(kind(), (X[:2],))


def test_a_hook_on_a_tensor_is_refused_with_the_line_and_the_way_out() -> None:
    with pytest.raises(llfx.CaptureError, match=r"at `y\.register_hook.*a hook on a tensor.*torch\.autograd\.Function"):
        llfx.capture(Hooks(), (X[:2],))


def test_a_question_on_which_nothing_hangs_is_no_matter() -> None:
    cfg = llfx.LoRA(r=2, target_names=".")
    gm, wrapped = (adapt(AsksInVain(), cfg, (X[:2],)) for adapt in (llfx.rewrite, llfx.wrap))
    for model in (gm, wrapped):
        randomise(model, 0)
    close(gm(X), wrapped(X), 1e-6, "output")
