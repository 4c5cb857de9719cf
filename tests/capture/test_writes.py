"""What a model writes in place while it runs: it stays in the graph, in both modes, and the user's model is not it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.untouched import untouched

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """The same block with batch norm runs twice in a row of modules."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.layers = nn.Sequential(block, nn.Tanh(), block)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OwnNorm(nn.BatchNorm1d):
    """Batch norm with a forward of its own, as libraries of models have: symbolic tracing goes into it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        arguments = (self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.batch_norm(x, *arguments, self.momentum, self.eps)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = OwnNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(self.norm(x)))


class Writes(nn.Module):
    """Nobody reads what these calls return."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.norm = nn.ReLU(inplace=True), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        x.mul_(2)
        torch.sub(x, 1)
        F.relu(x, inplace=True)
        torch.neg_(x)
        self.act(x)
        self.calls.add_(1)
        self.norm(q)
        return q + self.k(x + 1)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("cls", [Twice, Normed, Writes], ids=lambda cls: cls.__name__)
def test_writes_are_kept_and_follow_the_mode(cls: type[nn.Module], exported: bool) -> None:
    """The reference is the eager wrapper; buffers after each call are compared too."""
    torch.manual_seed(0)
    model: Any = cls()
    example_inputs = (X[:3],) if exported else None
    cfg = llfx.LoRA(r=2, target_names=(".",))
    with untouched(model):
        gm = llfx.rewrite(model, cfg, example_inputs)
        wrapped = llfx.wrap(model, cfg, example_inputs)
        randomise(gm, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
        for training in (True, True, False, True):
            results = []
            for one in (gm.train(training), wrapped.train(training)):
                torch.manual_seed(1)
                results.append((one(X), {name: buffer.clone() for name, buffer in one.named_buffers()}))
            (y, buffers), (expected, expected_buffers) = results
            close(y, expected, 1e-6, f"training={training}")
            # A module of several names has its buffers under one of them, and not the same in both.
            values, expected_values = (
                {name.rpartition(".")[2]: b for name, b in of.items()} for of in (buffers, expected_buffers)
            )
            assert values.keys() == expected_values.keys() != set()
            for name, value in values.items():
                close(value.double(), expected_values[name].double(), 1e-6, name)


def test_dead_code_without_effects_is_removed() -> None:
    gm = llfx.rewrite(Writes(), llfx.LoRA(r=2, target_names=("q",)))
    targets = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    assert {"mul_", "relu", "neg_", "act", "norm", "add_"} <= set(targets)
    assert "sub" not in targets
