"""A model that computes the same in training and in evaluation is captured once, and any other one twice."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.capture.compare import require_equal
from tests.support.selection import broad_after
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
    "a dropout": (lambda x: F.dropout(x * 2.0, 0.5), 2),
    "a branch on sizes": (lambda x: x * 2.0 if x.shape[0] > 2 else x * 4.0, 2),
    "a further result": (lambda x: (x * 2.0, x), 2),
}


def attended(x: Tensor, training: bool) -> Tensor:
    """Return what an attention with a dropout returns, which lies otherwise in memory without the dropout."""
    x = x.view(1, -1, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * training)


# Dropouts, as a function of a value and of whether the mode is that of training; and how many captures they take.
DROPOUTS: dict[str, tuple[Callable[[Tensor, bool], Any], int]] = {
    "a dropout": (lambda x, training: F.dropout(x, 0.5, training), 1),
    "its own function": (lambda x, training: torch.dropout(x, 0.5, training) + 1.0, 1),
    "its probability tells": (lambda x, training: F.dropout(x, 0.5 if training else 0.0), 1),
    "in training alone": (lambda x, training: F.dropout(x, 0.5) if training else x, 2),
    "in place": (lambda x, training: F.dropout(x * 2.0, 0.5, training, inplace=True), 2),
    "a sum in place after it": (lambda x, training: F.dropout(x * 2.0, 0.5, training).add_(1.0), 1),
    "unread": (lambda x, training: (F.dropout(x, 0.5, training), x * 3.0)[1], 1),
    "one of two equal ones": (lambda x, training: F.dropout(F.dropout(x, 0.5, training), 0.5, True), 2),
    "of another kind": (lambda x, training: F.alpha_dropout(x, 0.5, training), 2),
    "beside another number": (lambda x, training: F.dropout(x, 0.5, training) * (2.0 if training else 3.0), 2),
    "in an attention": (lambda x, training: attended(x, training).transpose(1, 2).contiguous().view(-1, 4), 1),
    "in an attention, contiguous in training": (lambda x, training: attended(x, training).contiguous().view(-1, 4), 2),
}


class Drops(nn.Module):
    """A layer with dropouts."""

    def __init__(self, drop: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.up(x), self.training)


@pytest.mark.parametrize("name", MODES)
def test_a_model_is_captured_once_if_both_modes_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = MODES[name]
    calls = count_exports(monkeypatch)
    model: Any = ByMode(change)
    x = torch.randn(3, 4, requires_grad=True)
    if name == "a further result":
        with pytest.raises(llfx.CaptureError):
            llfx.capture(model, (x.detach(),), verify=False)
        assert len(calls) == expected
        return
    require_same(llfx.capture(model, (x.detach(),), verify=False), model, x)
    assert len(calls) == expected


@pytest.mark.parametrize("name", broad_after(6, DROPOUTS))
def test_a_model_is_captured_once_if_dropouts_alone_tell_the_modes_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, expected = DROPOUTS[name]
    calls = count_exports(monkeypatch)
    model = Drops(drop)
    x = torch.randn(6, 4, requires_grad=True)
    require_same(llfx.capture(model, (x.detach(),), verify=False), model, x)
    assert len(calls) == expected


def count_exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each export."""
    capturing: Any = importlib.import_module("lora_lite_fx.capture.capture_model")
    calls: list[int] = []
    original = capturing.export

    def export(*args: Any) -> fx.GraphModule:
        calls.append(1)
        captured: fx.GraphModule = original(*args)
        return captured

    monkeypatch.setattr(capturing, "export", export)
    return calls


def require_same(gm: Any, model: Any, x: Tensor) -> None:
    """Compare results and gradients in both modes, to the bit."""
    for mode in (True, False):
        results = []
        for run in (gm.train(mode), model.train(mode)):
            torch.manual_seed(0)
            y = run(x)
            results.append((y, torch.autograd.grad(y.sum(), x)[0]))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_graph_that_has_modes_is_run_in_each_of_them() -> None:
    inputs = (torch.randn(3, 4),)
    model, other = ByMode(MODES["the same"][0]), ByMode(MODES["another number"][0])
    require_equal(llfx.capture(model, inputs), model, [(inputs, {})], same_in_both_modes=True)
    with pytest.raises(llfx.CaptureError, match="in training"):
        require_equal(llfx.capture(other, inputs), model, [(inputs, {})], same_in_both_modes=False)
