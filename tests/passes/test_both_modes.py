"""Models that run other operations in training than in evaluation: their graph has both, a program has one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.modes import by_mode
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.conformance import randomise

WIDTH = 8


class Block(nn.Module):
    """A residual block with batch norm and dropout, which training leaves out for some rows of the batch."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.linear, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.linear(x)).tanh())
        if self.drop and self.training:
            keep = 1 - self.drop
            y = y.div(keep) * (keep + torch.rand((x.shape[0], 1), dtype=x.dtype)).floor()
        result: Tensor = x + y
        return result


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(0.0), Block(0.4), Block(0.4)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


@functools.cache
def captured() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = StochasticDepth()
    return model, llfx.capture(model, (torch.randn(6, WIDTH),))


def adapted() -> tuple[fx.GraphModule, nn.Module, Tensor]:
    """Return the graph with adapters, the model wrapped with the same, and inputs."""
    model, base = captured()
    gm = llfx.rewrite(base, llfx.LoRA(r=2, target_names="."))
    randomise(gm, 0)
    return gm, wrap_again(gm, model), torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Return outputs, gradients, the next random number, and statistics."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x)
    y.sin().sum().backward()
    gradients = [p.grad.clone() for p in llfx.adapter_parameters(model) if p.grad is not None]
    norm: Any = model.get_submodule("layers.1.norm")
    return [y.detach(), *gradients, torch.rand(1), norm.running_mean.clone(), norm.num_batches_tracked.clone()]


def test_each_mode_computes_what_the_wrapper_does_and_draws_as_many_random_numbers() -> None:
    gm, wrapped, x = adapted()
    for training in (True, False, True):
        expected, actual = run(wrapped, x, training), run(gm, x, training)
        assert len(actual) == 1 + 8 + 3
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(actual[-3], expected[-3])


def test_a_program_has_the_operations_of_one_mode() -> None:
    gm, _, _ = adapted()
    rand = torch.ops.aten.rand.default
    training, inference = (llfx.program(gm, program).graph for program in ("training", "inference"))
    assert len(gm.graph.find_nodes(op="call_function", target=by_mode)) == 1
    assert len(training.find_nodes(op="call_function", target=rand)) == 2
    assert not inference.find_nodes(op="call_function", target=rand)
    assert not any(node.target is by_mode for graph in (training, inference) for node in graph.nodes)


def test_sites_are_those_of_the_model_and_remove_and_merge_know_both_calls() -> None:
    gm, wrapped, x = adapted()
    assert [row.name for row in llfx.inspect(gm)] == [*(f"layers.{i}.linear" for i in range(3)), "head"]
    assert "head" in llfx.inspect(gm)[-1].roles
    assert str(llfx.remove(gm).graph) == str(captured()[1].graph)
    torch.testing.assert_close(llfx.merge(gm).eval()(x), wrapped.eval()(x))


@pytest.mark.broad
def test_compiled_and_exported_graphs_follow_the_mode() -> None:
    gm, wrapped, x = adapted()
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        gm.train(training), wrapped.train(training)
        torch.manual_seed(3)
        expected = wrapped(x)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(gm.eval(), (x,))
    torch.testing.assert_close(program.module()(x), wrapped(x))


def test_frozen_runs_evaluation() -> None:
    gm, wrapped, x = adapted()
    gm.eval()
    with torch.no_grad(), llfx.frozen(gm):
        torch.testing.assert_close(gm(x), wrapped.eval()(x))


class OtherResults(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, x + 1) if self.training else (x,)


def test_other_results_in_each_mode_are_refused() -> None:
    with pytest.raises(llfx.CaptureError, match="other operations in training"):
        llfx.capture(OtherResults(), (torch.ones(2, 3),))


class Jitter(nn.Module):
    """Multiplies by noise in training, in place, and overwrites a part of what it made in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.9, 1.1)
            y[:, :2] = 5.0
        z = y + 1
        y[:, 1:] = self.linear(x)[:, 1:]
        return y + z


def test_what_a_mode_overwrites_is_its_own() -> None:
    model, x = Jitter(), torch.randn(3, 4)
    gm = llfx.capture(model, (x,))
    for training in (True, False):
        states = []
        for each in (gm, model):
            each.train(training)
            torch.manual_seed(0)
            states.append((each(x), torch.rand(1)))
        torch.testing.assert_close(*states)


class SampledThreshold(nn.Module):
    """Routing with a threshold that no gradient passes, and noise that only training adds."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if self.training:
            scores = scores + torch.rand_like(scores)
        with torch.no_grad():
            threshold = scores.mean(-1, keepdim=True)
        result: Tensor = self.head(scores * torch.sigmoid(scores - threshold))
        return result


def test_what_no_gradient_passes_is_of_each_mode() -> None:
    model, x = SampledThreshold(), torch.randn(4, WIDTH)
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."), (x,))
    randomise(gm, 0)
    wrapped = wrap_again(gm, model)
    for training in (True, False):
        found = []
        for each in (gm, wrapped):
            each.train(training)
            torch.manual_seed(0)
            y = each(x)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [*llfx.adapter_parameters(each)])])
        torch.testing.assert_close(*found)


class ComputedWeight(nn.Module):
    """Has a region without gradients before a linear whose weight is computed, in both of its modes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 1
        with torch.no_grad():
            scale = x.abs().mean()
        result: Tensor = self.linear(x / scale)
        return result


def test_a_weight_that_is_computed_outside_of_a_region_has_its_adapter_in_both_modes() -> None:
    model = ComputedWeight()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."))
    x = torch.randn(3, 4)
    for training in (True, False):
        gm.train(training)
        randomise(gm, 0)
        torch.testing.assert_close(gm(x), wrap_again(gm, model).train(training)(x))
        one = gm(x)
        randomise(gm, 1)
        assert not torch.allclose(one, gm(x))


def test_parts_of_such_models_follow_their_modes_as_far_as_the_graph_can() -> None:
    gm, wrapped, x = adapted()

    def put(modes: dict[str, bool]) -> None:
        for model in (gm, wrapped):
            model.train()
            for path, mode in modes.items():
                model.get_submodule(path).train(mode)

    norms = {f"layers.{i}.norm": False for i in range(3)}
    for modes in (norms, {"layers.1.dropout": False, "head": False}, {"": False, "layers.2.linear": True}):
        put(modes)
        results = []
        for model in (gm, wrapped):
            torch.manual_seed(3)
            y = model(x)
            parameters = [*llfx.adapter_parameters(model)]
            results.append(
                [y, *torch.autograd.grad(y.sin().sum(), parameters), model.get_buffer("layers.1.norm.running_mean")]
            )
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for modes, names in (
        ({"": False, "layers.1": True}, "layers.1 is in training mode and layers.2"),
        ({"": False, "layers.1.dropout": True}, "layers.1.dropout is in training mode and layers.1 in evaluation"),
    ):
        put(modes)
        with pytest.raises(llfx.CallError, match=names):
            gm(x)
        with torch.no_grad(), pytest.raises(llfx.CallError, match=names), llfx.frozen(gm):
            gm(x)
        with pytest.raises(llfx.CallError, match=names):
            fx.Interpreter(gm).run(x)


def test_dropout_in_evaluation_needs_a_rate_of_zero_for_stochastic_depth() -> None:
    x = torch.randn(6, WIDTH)
    for rate in (0.0, 0.4):
        model = nn.Sequential(Block(rate), nn.Dropout(0.5))
        gm = llfx.capture(model, (x,)).eval()
        gm.get_submodule("1").train()
        if rate:
            with pytest.raises(llfx.CallError, match=r"1 is in training mode and 0 in evaluation mode.*MC dropout"):
                gm(x)
        else:
            assert (gm(x) == 0).any()
