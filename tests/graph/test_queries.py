"""Questions about nodes: what counts as a product, what may move past what, and what computes the same again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.predispatch import _vmap_increment_nesting
from torch.nn import functional as F

from lora_lite_fx.compat.torch import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED
from lora_lite_fx.graph.queries import is_deterministic, is_product, obstacle_between
from tests.support.adapter_graphs import exported, x

aten = torch.ops.aten


def test_a_linear_with_a_bias_is_not_a_product() -> None:
    gm = exported(lambda m, x: (F.linear(x, m.a), F.linear(x, m.weight, m.bias)), x())
    products = [node.name for node in gm.graph.nodes if is_product(node)]
    assert products == ["linear"]


def between(*calls: tuple[Any, tuple[Any, ...]]) -> str:
    """Return the obstacle that these calls are between two nodes; "x" stands for the value of the first."""
    graph = fx.Graph()
    first = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
    for target, args in calls:
        graph.call_function(target, tuple(first if arg == "x" else arg for arg in args))
    last = graph.call_function(aten.neg.default, (first,))
    graph.output(last)
    return obstacle_between(fx.GraphModule(nn.Module(), graph), first, last)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (ENTER_AUTOCAST, ("cpu", torch.bfloat16, True, False)),
        (EXIT_AUTOCAST, ("x",)),
        (torch.is_grad_enabled, ()),
        (SET_GRAD_ENABLED, ("x",)),
        (_vmap_increment_nesting, (3, "error")),
    ],
    ids=["enters autocast", "leaves autocast", "enters a mode of autograd", "leaves it", "vmap"],
)
def test_nothing_moves_across_the_border_of_a_region(target: Any, args: tuple[Any, ...]) -> None:
    assert between((target, args)) == "a mode, or a level of a transform, begins or ends in between"


def test_nothing_moves_across_a_write() -> None:
    assert between((aten.mul_.Tensor, ("x", 2))) == "a tensor is overwritten in between"
    assert between((aten.mul.Tensor, ("x", 2))) == ""


def draws(value: Tensor) -> Tensor:
    return value + torch.rand(())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.neg.default, True),
        (aten.dropout.default, False),
        (aten.rand_like.default, False),
        (aten.neg_.default, False),
        (draws, False),
    ],
    ids=["operator", "dropout", "random", "write", "function"],
)
def test_only_operators_without_effects_are_deterministic(target: Any, expected: bool) -> None:
    graph = fx.Graph()
    assert is_deterministic(graph.call_function(target, (graph.placeholder("x"),))) is expected
