"""`recompute_weights`: a computed frozen weight is computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.ops.recomputed_product import RecomputedProduct
from lora_lite_fx.passes import Outcome, RecomputeWeights
from tests.support.adapter_graphs import check, exported, x
from tests.support.programs import reasons


class Scaled(nn.Module):
    """A weight that is computed, one that is a view, and perhaps a write in place."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 1))
        self.overwrites = overwrites

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.weight * self.gain), self.weight.t())
        return y.relu_() if self.overwrites else y


def graph(overwrites: bool = False) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return llfx.capture(Scaled(overwrites), (torch.randn(3, 4),))


def test_one_operation_replaces_the_linear_and_the_computation() -> None:
    gm, x = graph(), torch.randn(3, 4, requires_grad=True)
    y = gm(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    outcome = RecomputeWeights().run(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert outcome == Outcome(1)
    targets = [node.target for node in gm.graph.nodes]
    assert sum(isinstance(target, RecomputedProduct) for target in targets) == 1
    assert targets.count(torch.ops.aten.linear.default) == 1, "the weight that is a view is kept as it is"
    assert torch.ops.aten.mul.Tensor not in targets
    again = torch.fx.Interpreter(gm).run(x)
    result = again[0] if isinstance(again, (tuple, list)) else again
    assert torch.equal(result, y)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], expected)


class Pairs(nn.Module):
    """A weight of complex numbers, computed from pairs of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(F.linear(torch.view_as_complex(x), torch.view_as_complex(self.weight)))


def test_the_gradient_of_a_complex_product_takes_the_conjugate_weight() -> None:
    gm, x = llfx.capture(Pairs(), (torch.randn(3, 2, 2),)), torch.randn(3, 2, 2, requires_grad=True)
    (expected,) = torch.autograd.grad(gm(x).square().sum(), x)
    assert RecomputeWeights().run(gm) == Outcome(1)
    gm.recompile()
    again = torch.fx.Interpreter(gm).run(x)
    result = again[0] if isinstance(again, (tuple, list)) else again
    assert torch.equal(torch.autograd.grad(result.square().sum(), x)[0], expected)


def test_a_graph_that_overwrites_is_left_alone() -> None:
    outcome = RecomputeWeights().run(graph(overwrites=True))
    assert outcome.edits == 0
    assert [declined.why for declined in outcome.declined] == ["the graph overwrites tensors"]


def noisy(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, F.dropout(m.weight * 2.0, 0.5, True))


def test_a_weight_that_is_drawn_at_random_is_saved() -> None:
    report = check(exported(noisy, x(), base="mul dropout linear"), RecomputeWeights(), x(), edits=0)
    assert reasons(report) == ["linear: it is computed by dropout, which is random or changes a tensor"]


def test_products_of_adapters_are_left_alone() -> None:
    """A graph may compute what an adapter multiplies with of the base's own tensors, as AntiPaSTO does."""
    check(exported(lambda m, x: F.linear(x, m.weight * 2.0), x(), base="mul"), RecomputeWeights(), x(), edits=0)
