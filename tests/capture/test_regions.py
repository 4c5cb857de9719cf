"""Check linears in `no_grad` and `autocast` regions: the graph is flat and runs them in the same modes."""

from __future__ import annotations

import functools
import io
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import InlineRegions, Pipeline
from tests.support.conformance import check_file, check_merge, check_remove, close, gradients, output, randomise
from tests.support.releases import since
from tests.support.untouched import untouched

X = (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),)
TRACED = (torch.randn(2, 4, generator=torch.Generator().manual_seed(1)),)
HOPS = (torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled)


class Regions(nn.Module):
    """A module with a linear in each region, and between them. The regions have a constant, a buffer and a dropout."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(4, 4), nn.Linear(4, 6)
        self.low, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.linspace(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            z = self.frozen(x * self.scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = nn.functional.dropout(self.low(z) + torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.3, self.training)
        result: Tensor = self.last(y.float() + x)
        return result


class Nested(nn.Module):
    """A module with an autocast region inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
            with torch.autocast("cpu", enabled=False):
                y = self.c(y.float())
        result: Tensor = x + y
        return result


CFG = llfx.LoRA(r=2, target_names=(".",))


@functools.cache
def models() -> tuple[nn.Module, fx.GraphModule, fx.GraphModule, nn.Module]:
    """Return the model, its graph, the rewritten graph and the eager wrapper."""
    torch.manual_seed(0)
    model = Regions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = llfx.capture(model, TRACED)
        gm = llfx.rewrite(base, CFG)
        wrapped = llfx.wrap(model, CFG, TRACED)
    randomise(gm, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    return model, base, gm, wrapped


def test_the_graph_is_flat_and_its_linears_are_sites() -> None:
    _, base, _, _ = models()
    assert not [node for node in base.graph.nodes if node.target in HOPS]
    assert [row.name for row in llfx.inspect(base)] == ["first", "frozen", "low", "last"]
    assert not [name for name, module in base.named_modules() if "submod" in name], "bodies are left over"


@pytest.mark.parametrize("training", [True, False])
def test_the_rewritten_graph_equals_the_eager_wrapper(training: bool) -> None:
    _, _, gm, wrapped = models()
    y, grads = gradients(gm.train(training), X)
    expected_y, expected = gradients(wrapped.train(training), X)
    close(y, expected_y, 0.0, "output")
    assert grads.keys() == expected.keys()
    assert {name.partition(".")[0] for name in grads} == {"first", "low", "last"}, "no_grad stops nothing else"
    for name, grad in grads.items():
        close(grad, expected[name], 1e-6, name)  # The same terms are added in another order.


@pytest.mark.parametrize("outer", [True, False])
def test_the_caller_gets_its_own_modes_back(outer: bool) -> None:
    _, _, gm, _ = models()
    with torch.set_grad_enabled(outer), torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        assert gm(*X).requires_grad is outer
        assert torch.is_grad_enabled() is outer
        assert torch.is_autocast_enabled("cpu") is outer


def test_dead_code_elimination_keeps_the_modes() -> None:
    _, base, _, _ = models()
    modes = [node for node in base.graph.nodes if "grad_enabled" in str(node.target) or "autocast" in str(node.target)]
    assert len(modes) == 5  # Gradients: read the mode, off, restore. Autocast: enter, exit.


def test_merge_remove_and_files_work_with_regions() -> None:
    model, base, gm, _ = models()
    check_merge(gm, base, X, 2e-2)  # Autocast rounds the weights after merging.
    check_remove(gm, base, model)
    check_file(gm, base, X)


def test_a_graph_with_regions_compiles_without_breaks() -> None:
    _, _, gm, _ = models()
    compiled = torch.compile(gm.eval(), fullgraph=True, backend="aot_eager")
    close(output(compiled, X), output(gm, X), 1e-6, "compiled")


@pytest.mark.broad
def test_export_makes_regions_again_and_its_file_keeps_their_adapters() -> None:
    _, _, gm, _ = models()
    file = io.BytesIO()
    dynamic = ([torch.export.Dim.AUTO] * 2,)
    torch.export.save(torch.export.export(gm.eval(), TRACED, dynamic_shapes=dynamic), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert len([node for node in loaded.graph.nodes if node.target in HOPS]) == 2
    close(output(loaded, X), output(gm, X), 0.0, "exported")
    assert list(llfx.adapter_state_dict(loaded)) == list(llfx.adapter_state_dict(gm))
    close(output(llfx.remove(loaded), X), output(llfx.remove(gm), X), 0.0, "removed from the file")


def test_nested_regions_equal_the_eager_wrapper() -> None:
    model = Nested()
    with untouched(model):
        gm = llfx.rewrite(model, CFG, TRACED)
        randomise(gm, 0)
        wrapped = llfx.wrap(model, CFG, TRACED)
        llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    close(output(gm, X), output(wrapped, X), 0.0, "output")
    assert len(llfx.inspect(gm)) == 3


@since("torch", "2.13", "Regions of autocast compile with dynamic sizes, and stay")
def test_regions_without_anything_to_adapt_stay() -> None:
    class Rotary(nn.Module):
        freq: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("freq", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x)
            with torch.autocast("cpu", enabled=False):
                angles = (x * self.freq).cos()
            rotated: Tensor = y * angles
            return rotated

    base = llfx.capture(Rotary(), TRACED)
    assert [node.target for node in base.graph.nodes if node.target in HOPS] == [HOPS[0]]
    (report,) = Pipeline((InlineRegions(),)).run(base)
    assert report.edits == 0


def test_linears_in_branches_are_not_sites() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, self.inner, lambda y: y - 1, (self.lin(x),))
            return y

    assert [row.name for row in llfx.inspect(Branch(), TRACED)] == ["lin"]
    torch.compiler.reset()  # a torch.cond that was traced symbolically keeps Dynamo from tracing the next one


@pytest.mark.broad
def test_adapting_a_site_that_runs_without_gradient_warns() -> None:
    _, base, _, _ = models()
    with pytest.warns(UserWarning, match=r"1 of the sites \(frozen, \.\.\.\) under torch\.no_grad"):
        llfx.rewrite(base, CFG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model runs")
        llfx.rewrite(base, llfx.LoRA(r=2, target_names=(".",), exclude_names=("frozen",)))
