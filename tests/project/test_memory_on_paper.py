"""`examples/memory_on_paper.py`: tensors without data give the counts of tensors with data."""

from __future__ import annotations

import memory_on_paper as paper
import pytest
import torch
from counted_bytes import MovedBytes, kept_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.selection import slow_unless

TOKENS = 96


@pytest.mark.broad
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("method", slow_unless("dora".__eq__, paper.METHODS))
def test_counts_without_data_are_those_with_data(method: str) -> None:
    real = paper.counts("tiny", method, TOKENS)
    with FakeTensorMode():
        on_paper = paper.counts("tiny", method, TOKENS)
    fused = on_paper.pop("this library, fused loss")
    of_data = real.pop("this library, fused loss")  # with data it leaves out the row without a label
    assert (fused.weights, fused.trained, fused.kept) == (of_data.weights, of_data.trained, of_data.kept)
    assert fused.moved == pytest.approx(of_data.moved, rel=0.05)
    assert on_paper == real
    ours, theirs = on_paper["this library"], on_paper["PEFT"]
    assert (ours.weights, ours.trained) == (theirs.weights, theirs.trained)
    assert ours.kept < theirs.kept


def test_kept_bytes_are_those_of_the_formula() -> None:
    linear = nn.Linear(8, 4, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    kept, loss = kept_bytes(lambda: (linear(x).relu() * 2).sum(), [linear], [x])
    assert kept == 5 * 4 * 4  # what relu returns; the input and the weight do not count
    assert loss.requires_grad


def test_what_is_saved_for_a_value_that_is_detached_is_not_kept() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    kept, _ = kept_bytes(lambda: (x * x.exp().sum(1).sqrt().detach()[:, None]).sum(), [], [x])
    assert kept == 5 * 4  # the factors


def test_views_move_nothing_and_products_what_they_read_and_write() -> None:
    x, w = torch.randn(5, 8), torch.randn(8, 4)
    with MovedBytes() as moved:
        x.t().reshape(8, 5)
        assert moved.total == 0
        x @ w
    assert moved.total == 4 * (5 * 8 + 8 * 4 + 5 * 4)
    with MovedBytes() as moved:
        x.mul_(2)
    assert moved.total == 4 * 2 * 5 * 8
