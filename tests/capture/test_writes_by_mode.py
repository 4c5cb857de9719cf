"""Check models that write in one mode alone: a graph writes as they do in each mode, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.support.untouched import untouched

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
Writes = Callable[[Any, Tensor], Any]


class Between(nn.Module):
    """Two linears with a function between them that may write to buffers."""

    count: Tensor
    values: Tensor
    variance: Tensor

    def __init__(self, between: Writes) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("values", torch.rand(8))
        self.register_buffer("variance", torch.ones(8))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self, self.first(x)))
        return y


def counts(m: Any, x: Tensor) -> Any:
    if m.training:
        m.count.add_(1)
    return x + m.count


def own_sum(m: Any, x: Tensor) -> Any:
    y = 2 * x
    if m.training:
        y.add_(1)
    return y + x


def own_result(m: Any, x: Tensor) -> Any:
    y = torch.zeros_like(x)
    if m.training:
        torch.mul(x.detach(), 2, out=y)
    return y + x


def activation(m: Any, x: Tensor) -> Any:
    if m.training:
        x = m.act(x)
    return x.tanh()


def statistics(m: Any, x: Tensor) -> Any:
    normed = F.batch_norm(x, m.values, m.variance, training=m.training)
    return normed + x.sin() if m.training else normed


def counts_by_out(m: Any, x: Tensor) -> Any:
    if m.training:
        torch.add(m.count, 1, out=m.count)
    return x + m.count


def average(m: Any, x: Tensor) -> Any:
    if m.training:
        m.values.lerp_(x.detach().mean(0), 0.1)
    return x - m.values


def data(m: Any, x: Tensor) -> Any:
    if m.training:
        m.values.data.mul_(0.5)
    return x + m.values


def view(m: Any, x: Tensor) -> Any:
    if m.training:
        m.values.view(2, 4)[0].mul_(2)
    return x + m.values


def counts_in_evaluation(m: Any, x: Tensor) -> Any:
    if not m.training:
        m.count.add_(1)
    return x + m.count


def counts_beside(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    return (x.tanh() if m.training else x) + m.count


def both_otherwise(m: Any, x: Tensor) -> Any:
    if m.training:
        m.values.zero_().add_(1)
    else:
        m.values.fill_(3)
    return x * m.values


FOLLOWED = [counts, own_sum, own_result, activation, statistics]
REFUSED = [counts_by_out, average, data, view, counts_in_evaluation, counts_beside, both_otherwise]
EXPORTED = broad_after(1, [False, True])


@pytest.mark.parametrize("exported", EXPORTED)
@pytest.mark.parametrize("between", broad_after(2, FOLLOWED), ids=lambda each: each.__name__)
def test_a_graph_writes_in_each_mode_as_the_model_does(between: Writes, exported: bool) -> None:
    model, cfg, inputs = Between(between).double(), llfx.LoRA(r=2, target_names=("first", "last")), None
    if exported:
        inputs = (X.double(),)
    with untouched(model):
        gm, wrapped = llfx.rewrite(model, cfg, inputs), llfx.wrap(model, cfg, inputs)
        randomise(gm, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
        for call, training in enumerate((True, True, False, True, False, False)):
            x = torch.randn(6, 8, dtype=torch.float64)
            close(gm.train(training)(x), wrapped.train(training)(x), 1e-9, f"call {call}, training={training}")


@pytest.mark.parametrize("exported", EXPORTED)
@pytest.mark.parametrize("between", REFUSED, ids=lambda each: each.__name__)
def test_what_one_mode_writes_to_the_model_is_refused_if_it_is_not_a_count(between: Writes, exported: bool) -> None:
    model = Between(between)
    with untouched(model), pytest.raises(llfx.CaptureError, match="other operations in training"):
        llfx.rewrite(model, llfx.LoRA(r=2, target_names=("first", "last")), (X,) if exported else None)
