"""Each part of a graph has a mode of its own, as each module of the model has: `bn.eval()` in a model in training."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.captured import captured, twins
from tests.support.conformance import randomise
from tests.support.selection import broad_after, slow_after

WIDTH = 8
EXAMPLE = (torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)),)
X = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
LORA = llfx.LoRA(r=2, dropout=0.4, target_names=".")


class Block(nn.Module):
    """Has all that depends on a mode: batch norm, dropout as a module and as a function, and that of attention."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.linear(x)).tanh())
        heads = F.dropout(y, 0.2, self.training).unflatten(-1, (2, 4))
        y = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3 if self.training else 0.0)
        return x + y.flatten(-2)


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(norm) for _ in range(3))
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(F.dropout(self.norm(x), 0.1, self.training))
        return result


PARTS = ("", "layers", "layers.0", "layers.1.norm", "layers.1.drop", "layers.1.linear", "layers.2", "norm", "head")
CAPTURES = {"exported": EXAMPLE, "traced": None}


@functools.cache
def stored(capture: str, norm: type[nn.Module]) -> tuple[nn.Module, fx.GraphModule]:
    model, base = captured(Net, norm, inputs=CAPTURES[capture])
    gm = llfx.rewrite(base, LORA)
    randomise(gm, 0)
    return model, gm


def adapted(capture: str = "exported", norm: Any = nn.BatchNorm1d, **execution: Any) -> tuple[Any, Any]:
    """Return a graph with adapters, and the model wrapped with the same."""
    model, gm = twins(*stored(capture, norm))
    if execution:
        gm.run_with(**execution)
    return gm, wrap_again(gm, model)


def seen(model: nn.Module, call: Callable[..., Tensor] | None = None, backward: bool = True) -> list[Tensor]:
    """Return the output of a call, gradients, statistics, and the next random number."""
    model.zero_grad()
    torch.manual_seed(3)
    y = (model if call is None else call)(X)
    if backward:
        y.sin().sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros(()) for p in llfx.adapter_parameters(model)]
    statistics = [buffer for name, buffer in sorted(model.named_buffers()) if "running" in name or "tracked" in name]
    return [value.detach().clone() for value in (y, *gradients, *statistics, torch.rand(1))]


def require_same(gm: nn.Module, wrapped: nn.Module, **options: Any) -> None:
    torch.testing.assert_close(seen(gm, **options), seen(wrapped, **options), rtol=1e-4, atol=1e-5)


def put(models: tuple[nn.Module, ...], modes: dict[str, bool]) -> None:
    """Put parts in modes, in this order."""
    for model in models:
        for path, mode in modes.items():
            model.get_submodule(path).train(mode)


MIXED: dict[str, dict[str, bool]] = {
    "frozen batch norm": {"": True, "layers.1.norm": False, "norm": False},
    "dropout that stays on": {"": False, "layers.1.drop": True},
    "a layer in evaluation": {"": True, "layers.0": False},
    "a layer in training": {"": False, "layers.2": True},
    "a site in evaluation": {"": True, "layers.1.linear": False, "head": False},
    "the model itself alone": {"": True, "layers": False, "norm": False, "head": False},
}


@pytest.mark.parametrize("capture", broad_after(1, CAPTURES))
def test_parts_follow_their_own_modes_in_each_call(capture: str) -> None:
    models = adapted(capture)
    for modes in MIXED.values():
        put(models, modes)
        require_same(*models)


@pytest.mark.broad
@pytest.mark.parametrize("capture", broad_after(1, CAPTURES))
def test_a_graph_has_the_modes_that_the_parts_had_before_it_was_captured(capture: str) -> None:
    model = Net()
    put((model,), MIXED["frozen batch norm"] | {"layers.2.drop": False})
    gm = llfx.rewrite(model, LORA, CAPTURES[capture])
    assert [gm.get_submodule(f"layers.{i}.norm").training for i in range(3)] == [True, False, True]
    assert not gm.get_submodule("layers.2.drop").training
    assert gm.training
    randomise(gm, 0)
    wrapped = wrap_again(gm, model)
    require_same(gm, wrapped)
    frozen: Any = gm.get_submodule("norm")
    assert frozen.num_batches_tracked == 0
    assert torch.equal(frozen.running_mean, torch.zeros(WIDTH))
    put((gm, wrapped), {"": True})
    require_same(gm, wrapped)
    assert frozen.num_batches_tracked == 1


@pytest.mark.broad
@settings(deadline=None)
@given(
    capture=st.sampled_from(sorted(CAPTURES)),
    steps=st.lists(st.dictionaries(st.sampled_from(PARTS), st.booleans(), max_size=4), max_size=3),
    backward=st.booleans(),
)
def test_random_modes_of_parts_are_those_of_the_wrapper(
    capture: str, steps: list[dict[str, bool]], backward: bool
) -> None:
    models = adapted(capture)
    for modes in [{}, *steps]:
        put(models, modes)
        require_same(*models, backward=backward)
        with torch.no_grad(), llfx.frozen(models[0]):
            require_same(*models, backward=False)


def test_frozen_keeps_no_mode() -> None:
    gm, wrapped = adapted()
    put((gm, wrapped), {"": False})
    with torch.no_grad(), llfx.frozen(gm):
        require_same(gm, wrapped, backward=False)
        for modes in MIXED.values():
            put((gm, wrapped), modes)
            require_same(gm, wrapped, backward=False)
            put((gm, wrapped), {"": False})
            require_same(gm, wrapped, backward=False)


@pytest.mark.broad
@pytest.mark.parametrize("execution", slow_after(1, [{"checkpoint_layers": True}, {"memory": "balanced"}]), ids=str)
def test_layers_that_keep_less_follow_the_modes_of_their_parts(execution: dict[str, Any]) -> None:
    models = adapted(norm=nn.LayerNorm, **execution)
    for modes in MIXED.values():
        put(models, modes)
        require_same(*models)


@pytest.mark.broad
def test_a_checkpointed_layer_runs_again_in_the_modes_of_its_call() -> None:
    gm, wrapped = adapted(norm=nn.LayerNorm, checkpoint_layers=True)
    put((gm, wrapped), {"": True, "layers.1.linear": False})
    gradients = []
    for model in (gm, wrapped):
        torch.manual_seed(3)
        loss = model(X).sin().sum()
        model.eval()
        gradients.append(torch.autograd.grad(loss, llfx.adapter_parameters(model)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.broad
def test_a_layer_that_is_called_alone_reads_its_own_modes() -> None:
    gm, wrapped = adapted(norm=nn.LayerNorm)
    gm(X)
    for mode in (True, False):
        put((gm, wrapped), {"": not mode, "layers.1": mode, "layers.1.drop": False})
        results = []
        for model in (gm, wrapped):
            torch.manual_seed(3)
            results.append(model.layers[1](X))
        torch.testing.assert_close(*results)


@pytest.mark.broad
def test_compiled_calls_guard_on_the_modes_of_parts() -> None:
    gm, wrapped = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    for name in ("frozen batch norm", "dropout that stays on", "a site in evaluation"):
        put((gm, wrapped), MIXED[name])
        torch.testing.assert_close(seen(gm, compiled), seen(wrapped), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), llfx.frozen(gm):
        for modes in ({"": False}, MIXED["dropout that stays on"], {"": False}):
            put((gm, wrapped), modes)
            torch.testing.assert_close(
                seen(gm, compiled, backward=False), seen(wrapped, backward=False), rtol=1e-4, atol=1e-5
            )


@pytest.mark.broad
@pytest.mark.parametrize("strict", slow_after(1, [False, True]))
def test_an_exported_graph_has_the_modes_of_its_export(strict: bool) -> None:
    gm, wrapped = adapted()
    for name in ("dropout that stays on", "frozen batch norm"):
        put((gm, wrapped), MIXED[name])
        program = torch.export.export(gm, (X,), strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.manual_seed(3)
        actual = torch.export.load(file).module()(X)
        torch.testing.assert_close(actual, seen(wrapped, backward=False)[0], rtol=1e-4, atol=1e-5)


def test_copies_and_graphs_made_of_a_graph_have_the_modes_of_its_parts() -> None:
    gm, wrapped = adapted()
    modes = {"": True, "layers": False, "layers.0": True, "layers.0.drop": False, "layers.2": True}
    put((gm, wrapped), modes)
    expected = {name: module.training for name, module in gm.named_modules()}
    made = {
        "a copy": copy.deepcopy(gm),
        "captured": llfx.capture(gm),
        "optimized": llfx.optimize(gm),
        "removed": llfx.remove(gm),
        "merged": llfx.merge(gm),
        "with another adapter": llfx.rewrite(gm, llfx.LoRA(r=1, target_names="head")),
        "a program": llfx.program(gm, "training"),
    }
    for name, graph in made.items():
        found = {path: module.training for path, module in graph.named_modules()}
        assert {path: found[path] for path in found if path in expected} == {
            path: mode for path, mode in expected.items() if path in found
        }, name
        assert [found["layers.1.norm"], found["layers.0.drop"]] == [False, False], name
    for name in ("a copy", "captured", "optimized", "a program"):
        torch.testing.assert_close(seen(made[name], backward=False)[0], seen(wrapped, backward=False)[0])


def test_stages_of_a_pipeline_have_the_modes_of_its_parts() -> None:
    gm, wrapped = adapted()
    put((gm, wrapped), {"": True, "layers.2.norm": False, "layers.0": False})
    first, second = llfx.split(gm, ["layers.2"])
    assert not first.get_submodule("layers.0.norm").training
    staged = seen(wrapped, lambda x: second(first(x=x), x=x), backward=False)
    torch.testing.assert_close(staged[0], seen(wrapped, backward=False)[0])


class KeepsFrozen(Net):
    """Keeps its norms frozen by a `train` of its own, as detectors do."""

    def train(self, mode: bool = True) -> KeepsFrozen:
        super().train(mode)
        for name in ("norm", "layers.1.norm"):
            self.get_submodule(name).eval()
        return self


@pytest.mark.broad
@pytest.mark.parametrize("capture", broad_after(1, CAPTURES))
def test_parts_that_the_models_own_train_keeps_frozen_stay_so(capture: str) -> None:
    model = KeepsFrozen()
    model.train()
    gm = llfx.rewrite(model, LORA, CAPTURES[capture])
    randomise(gm, 0)
    models: Any = (gm, wrap_again(gm, model))
    for mode in (True, False, True):
        put(models, {"": mode})
        require_same(*models)
    put(models, {"norm": True})  # itself, it can be unfrozen
    require_same(*models)
    put(models, {"": True})
    require_same(*models)


def test_verify_compares_in_the_modes_that_are_set() -> None:
    model, gm = twins(*stored("exported", nn.BatchNorm1d))
    gm.eval()
    assert {row.mode for row in llfx.verify(gm, model, EXAMPLE).rows} == {"training", "evaluation"}
    gm.layers[1].drop.train()
    table = llfx.verify(gm, model, EXAMPLE)
    assert table.ok
    assert {row.mode for row in table.rows} == {"training", "evaluation", "the modes of its parts"}


class LooksAtTheModel(nn.Module):
    """Follows the mode of another module than the one that runs the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, self.drop.training)


def test_a_mode_that_is_read_from_another_part_is_one_for_all() -> None:
    model = LooksAtTheModel()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names="."), EXAMPLE)
    wrapped = wrap_again(gm, model)
    for mode in (True, False):
        put((gm, wrapped), {"": mode})
        require_same(gm, wrapped)
    gm.get_submodule("drop").train()
    with pytest.raises(llfx.CallError, match="drop is in training mode and the model itself in evaluation mode"):
        gm(X)
    model.drop.eval()
    with pytest.raises(llfx.CaptureError, match="in the modes of its parts"):
        llfx.capture(model, EXAMPLE)
