"""Check that symbolic tracing follows `x += y` as Python does: it writes to a tensor, and only renames a number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.support.untouched import untouched


class Between(nn.Module):
    """Two linears with a function between them."""

    count: Tensor

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self, self.first(x)))
        return y


def other_name(m: Any, x: Tensor) -> Any:
    y = x
    y *= 2
    y -= 1
    y /= 3
    return x + y


def view(m: Any, x: Tensor) -> Any:
    y = x.view(-1, 4)
    y += 1
    return x


def attribute(m: Any, x: Tensor) -> Any:
    y = x.T
    y += 1
    return x


def parts(m: Any, x: Tensor) -> Any:
    one, other = x[:, :2], x[:, 2:]
    one += other
    return x


def buffer(m: Any, x: Tensor) -> Any:
    count = m.count
    count += 1
    return x * count


def residual(m: Any, x: Tensor) -> Any:
    y = x.tanh() * 2
    y += x
    return y


def copied(m: Any, x: Tensor) -> Any:
    y = copy.deepcopy(x.detach())
    y += 1
    return x + y


def number(m: Any, x: Tensor) -> Any:
    n = x.shape[1]
    before = n
    n += 1
    n *= 2
    return x * (n + before)


@pytest.mark.parametrize(
    "between", broad_after(4, [other_name, view, attribute, parts, buffer, residual, copied, number])
)
def test_a_graph_assigns_as_the_model_does(between: Callable[[Any, Tensor], Any]) -> None:
    model, cfg = Between(between).double(), llfx.LoRA(r=2, target_names=".")
    with untouched(model):
        gm, wrapped = llfx.rewrite(model, cfg), llfx.wrap(model, cfg)
        randomise(gm, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
        for training in (True, False, True):
            x, gradients = torch.randn(3, 4, dtype=torch.float64), []
            for adapted in (gm.train(training), wrapped.train(training)):
                parameters = llfx.adapter_parameters(adapted)
                gradients.append([adapted(x), *torch.autograd.grad(adapted(x).square().sum(), parameters)])
            for ours, theirs in zip(*gradients, strict=True):
                close(ours, theirs, 1e-9, f"training={training}")
