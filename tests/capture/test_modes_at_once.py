"""A model that computes the same in training and in evaluation is captured once, and any other one twice."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from tests.support.stacks import Straight


class ByMode(nn.Module):
    """A layer that may compute something else in training mode."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        x = self.up(x)
        return self.change(x) if self.training else x * 2.0


MODES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "the same": (lambda x: x * 2.0, 1),
    "another number": (lambda x: x * 3.0, 2),
    "another backward pass": (Straight.apply, 2),
    "a dropout": (lambda x: torch.nn.functional.dropout(x * 2.0, 0.5), 2),
    "a branch on sizes": (lambda x: x * 2.0 if x.shape[0] > 2 else x * 4.0, 2),
    "a further result": (lambda x: (x * 2.0, x), 2),
}


@pytest.mark.parametrize("name", MODES)
def test_a_model_is_captured_once_if_both_modes_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = MODES[name]
    capturing: Any = importlib.import_module("lora_lite_fx.capture.capture")
    calls: list[int] = []
    original = capturing.export

    def export(*args: Any) -> fx.GraphModule:
        calls.append(1)
        captured: fx.GraphModule = original(*args)
        return captured

    monkeypatch.setattr(capturing, "export", export)
    model: Any = ByMode(change)
    x = torch.randn(3, 4, requires_grad=True)
    if name == "a further result":
        with pytest.raises(llfx.CaptureError):
            llfx.capture(model, (x.detach(),), verify=False)
        assert len(calls) == expected
        return
    gm: Any = llfx.capture(model, (x.detach(),), verify=False)
    assert len(calls) == expected
    for mode in (True, False):
        results = []
        for run in (gm.train(mode), model.train(mode)):
            torch.manual_seed(0)
            y = run(x)
            results.append((y, torch.autograd.grad(y.sum(), x)[0]))
        torch.testing.assert_close(*results, rtol=0, atol=0)
