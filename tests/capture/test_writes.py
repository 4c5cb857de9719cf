"""Check in-place writes of a running model: the graph keeps them in both modes, the user's model does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after
from tests.support.untouched import untouched

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """A sequence of modules in which the same block with batch norm runs twice."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.layers = nn.Sequential(block, nn.Tanh(), block)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class OwnNorm(nn.BatchNorm1d):
    """A batch norm with its own forward, as model libraries have. Symbolic tracing goes into it."""

    num_batches_tracked: Tensor
    momentum: float

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
        y: Tensor = self.norm(self.out(self.norm(x)))
        return y


class Writes(nn.Module):
    """A module that writes in place and does not read the results of these calls."""

    calls: Tensor

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
        y: Tensor = q + self.k(x + 1)
        return y


class Counts(nn.Module):
    """A module that writes to a part of a buffer."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("counts", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.counts[:2] += 1
        with torch.no_grad():
            self.counts[2:].view(2, 2)[0].add_(y.detach().mean())
        return y + self.counts.sum()


class Weighted(nn.Module):
    """A module whose result is a product with a buffer that it has written to, whole or in part."""

    steps: Tensor
    parts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("parts", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.parts[1:].mul_(2)
        y: Tensor = self.linear(x) * self.steps * self.parts
        return y


class Spectral(nn.Module):
    """A model whose first weight is divided by its largest singular value, which training estimates in buffers."""

    normed: Any = staticmethod(nn.utils.parametrizations.spectral_norm)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = self.normed(nn.Linear(4, 4)), nn.Linear(4, 4)
        for buffer in self.first.buffers():
            nn.init.normal_(buffer)  # far from what training makes of it

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


class SpectralByHook(Spectral):
    """The same by the hook of earlier releases, which writes by `out=` and in training alone."""

    normed = staticmethod(nn.utils.spectral_norm)


class ByOut(Spectral):
    """A model that computes its first weight into a buffer, in both modes."""

    cache: Tensor

    normed = staticmethod(nn.Sequential)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = torch.mul(self.first[0].weight, 2.0, out=self.cache)
        y: Tensor = self.last(F.linear(x, weight))
        return y


def test_gradients_pass_through_a_product_with_a_buffer_that_was_written_to() -> None:
    model, cfg = Weighted(), llfx.LoRA(r=2, target_names=("linear",))
    gm, wrapped = llfx.rewrite(model, cfg, (X,)), llfx.wrap(model, cfg, (X,))
    for _ in range(2):
        gradients = []
        for adapted in (gm, wrapped):
            randomise(adapted, 0)
            parameters = llfx.adapter_parameters(adapted)
            gradients.append(torch.autograd.grad(adapted(X).square().sum(), parameters))
        for ours, theirs in zip(*gradients, strict=True):
            close(ours, theirs, 1e-5, "gradient")


def test_a_part_of_a_buffer_is_written_to_in_the_graph_alone() -> None:
    model, cfg = Counts(), llfx.LoRA(r=2, target_names=("linear",))
    gm, wrapped = llfx.rewrite(model, cfg, (X,)), llfx.wrap(model, cfg, (X,))
    for adapted in (gm, wrapped):
        randomise(adapted, 0)
        adapted(X)
    close(gm(X), wrapped(X), 1e-5, "second call")
    (ours, theirs) = (dict(adapted.named_buffers())["counts"] for adapted in (gm, wrapped))
    close(ours, theirs, 1e-5, "buffer")
    assert ours[0] == 2
    assert not model.counts.any()


@pytest.mark.parametrize(
    ("cls", "exported"),
    broad_after(
        3,
        [
            *((cls, True) for cls in (Twice, Normed, Writes)),
            *((cls, False) for cls in (Spectral, ByOut)),  # the former cannot be exported
            *((cls, False) for cls in (Twice, Normed, Writes)),
        ],
        several=True,
    ),
)
def test_writes_are_kept_and_follow_the_mode(cls: type[nn.Module], exported: bool) -> None:
    """Compare the results, and the buffers after each call, with those of the eager wrapper."""
    model: Any = cls()
    example_inputs = (X[:3],) if exported else None
    cfg = llfx.LoRA(r=2, target_names=("last",) if isinstance(model, Spectral) else (".",))
    with untouched(model):
        gm = llfx.rewrite(model, cfg, example_inputs)
        wrapped = llfx.wrap(model, cfg, example_inputs)
        of_graph = dict(gm.named_buffers(remove_duplicate=False))
        for name, buffer in model.named_buffers():
            assert torch.equal(of_graph.get(name, buffer), buffer), name
        randomise(gm, 0)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
        for training in (True, True, False, True):
            results = []
            for module in (gm.train(training), wrapped.train(training)):
                torch.manual_seed(1)
                results.append((module(X), {name: buffer.clone() for name, buffer in module.named_buffers()}))
            (y, buffers), (expected, expected_buffers) = results
            close(y, expected, 1e-6, f"training={training}")
            # Compare by the last part of the names, because graph and wrapper may list a shared module's
            # buffers under different names of the module.
            values, expected_values = (
                {name.rpartition(".")[2]: buffer for name, buffer in named.items()}
                for named in (buffers, expected_buffers)
            )
            assert values.keys() == expected_values.keys() != set()
            for name, value in values.items():
                close(value.double(), expected_values[name].double(), 1e-6, name)


@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "exported"])
def test_a_hook_that_writes_in_training_alone_is_refused(inputs: Any) -> None:
    model = SpectralByHook()
    with untouched(model), pytest.raises(llfx.CaptureError, match="other operations in training"):
        llfx.rewrite(model, llfx.LoRA(r=2, target_names=("last",)), inputs)


def test_dead_code_without_effects_is_removed() -> None:
    gm = llfx.rewrite(Writes(), llfx.LoRA(r=2, target_names=("q",)))
    targets = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    assert {"mul_", "relu", "neg_", "act", "norm", "add_"} <= set(targets)
    assert "sub" not in targets
