"""Check that models that are made and dropped, and calls of many shapes, leave nothing behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import lora_lite_fx as llfx
from lora_lite_fx.execution.adapted_graph_module import AdaptedGraphModule
from tests.support.models import tiny_llama

CYCLES = 6
"""Cycles after the first three; `python -m tests.execution.test_memory` runs 200."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


CFG = llfx.DoRA(r=2, target_names=("layers",))


def rewriting() -> None:
    model, x = Net(), torch.randn(3, 4)
    gm = llfx.rewrite(model, CFG, (x,))
    gm(x).sum().backward()
    with torch.no_grad(), llfx.frozen(gm.eval()):
        gm(x)
    llfx.merge(gm)(x)
    llfx.remove(gm)(x)


def adapting() -> None:
    model = transformers.LlamaForCausalLM(tiny_llama(num_hidden_layers=1, vocab_size=16))
    tokens = torch.randint(16, (2, 5))
    adapted = llfx.adapt(model, llfx.DoRA(r=2))
    adapted(tokens, labels=tokens).loss.backward()
    llfx.merge(adapted)(tokens)
    llfx.remove(adapted)(tokens)


def live() -> Counter[str]:
    """Count the live objects of the kinds that a cycle makes, but the fake tensors that torch.export itself keeps."""
    for _ in range(3):
        gc.collect()
    kinds = {AdaptedGraphModule: "graphs", fx.Graph: "fx graphs", Tensor: "tensors", nn.Module: "modules"}
    counts: Counter[str] = Counter()
    for each in gc.get_objects():
        if issubclass(type(each), FakeTensor):
            continue
        for kind, name in kinds.items():
            if issubclass(type(each), kind):
                counts[name] += 1
                break
    return counts


def growth(cycle: Callable[[], Any], cycles: int) -> dict[str, int]:
    """Return how many more objects are alive after further cycles than after the first three."""
    for _ in range(3):
        cycle()
    before = live()
    for _ in range(cycles):
        cycle()
    return {name: count - before[name] for name, count in live().items() if count > before[name]}


@pytest.mark.broad
@pytest.mark.parametrize(
    "cycle", [rewriting, pytest.param(adapting, marks=pytest.mark.slow)], ids=lambda cycle: cycle.__name__
)
def test_models_that_are_dropped_leave_nothing_behind(cycle: Callable[[], Any]) -> None:
    assert growth(cycle, CYCLES if cycle is rewriting else 2) == {}


@pytest.mark.broad
def test_calls_of_many_shapes_leave_nothing_behind() -> None:
    gm = llfx.rewrite(Net(), CFG, (torch.randn(3, 4),))

    def calls() -> None:
        for size in range(2, 60):
            gm(torch.randn(size, 4)).sum().backward()
            with torch.no_grad():
                gm(torch.randn(size, 4))

    assert growth(calls, 6) == {}


if __name__ == "__main__":
    for each in (rewriting, adapting):
        print(each.__name__, growth(each, 200))
