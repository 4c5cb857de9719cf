"""Check that a model captured by a few of its layers has the graph of a capture of all layers, node for node."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx

import lora_lite_fx as llfx
from lora_lite_fx.graph.writes import written_tensors
from tests.support.architectures import DECODERS, Architecture
from tests.support.architectures_others import OTHERS
from tests.support.conformance import check_rewrite_equals_wrap, rewrite_and_wrap
from tests.support.selection import broad_after, slow_unless
from tests.support.stacks import (
    LAYERS,
    ODD,
    PLANTED,
    Layer,
    ReadsBackwards,
    ReadsNeighbour,
    ReturnsAll,
    ReturnsSome,
    Stack,
    Weighted,
    WithCache,
)  # fmt: skip

ARCHITECTURES = {**DECODERS, **OTHERS}
DEPTH = 5
STAGED = {"convnext", "funnel", "segformer"}  # they have lists of depths, and stay as they are
_DEPTHS = (
    "num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layers"
)  # fmt: skip
_OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_types", "attention_layers")


def deep(architecture: Architecture, layers: int = DEPTH) -> Any:
    """The model of an architecture, with as many layers."""
    config = {name: value for name, value in architecture.config.items() if name not in _OF_EACH_LAYER}
    default = getattr(transformers, architecture.model).config_class()
    config |= {name: layers for name in _DEPTHS if getattr(default, name, None) is not None}
    if hasattr(default, "attention_types"):  # GPT-Neo's, which are counted
        config["attention_types"] = [[["global"], layers]]
    return Architecture(architecture.model, config, "", dtype=architecture.dtype).build()


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., fx.GraphModule]:
    """A function that captures a model with all its layers."""

    def capture(*args: Any, **kwargs: Any) -> fx.GraphModule:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("lora_lite_fx.capture.depth.by_depth"), "stacks_of", lambda model: {})
            return llfx.capture(*args, **kwargs)

    return capture


def described(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The nodes of a graph, with what passes read of their metadata."""

    def value(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{type(leaf).__name__} {leaf.dtype} {tuple(leaf.shape)} {leaf.stride()} {leaf.device}"
        return str([value(item) for item in leaf]) if isinstance(leaf, (tuple, list)) else str(leaf)

    nodes = []
    for node in gm.graph.nodes:
        modules = node.meta.get("nn_module_stack")
        line = node.meta.get("stack_trace")
        nodes.append((node.format_node() or "output", str(node.args), value(node.meta.get("val")), str(modules), line))
    return nodes


def tensors(gm: fx.GraphModule) -> dict[str, Any]:
    """The tensors of a graph: in which memory; or what values, of those that a capture makes."""
    made = written_tensors(gm)

    def key(name: str, tensor: Tensor) -> Any:
        is_made = name in made or "lifted_tensor" in name
        return type(tensor), tensor.tolist() if is_made else tensor.data_ptr(), tensor.requires_grad

    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name: key(name, tensor) for name, tensor in named}


def require_same(stamped: fx.GraphModule, full: fx.GraphModule) -> None:
    assert described(stamped) == described(full)
    assert stamped.code == full.code
    assert tensors(stamped) == tensors(full)
    assert list(stamped.state_dict()) == list(full.state_dict())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, logger="lora_lite_fx")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


EVERY_DAY = {"llama"}
PLANTED_EVERY_DAY = {"OtherConstant", "ReadsMiddle", "OtherInEvaluation", "BranchesOnIndex", "OtherDropout", "tied"}


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(lambda name: name in EVERY_DAY, ARCHITECTURES))
def test_stamped_graph_is_the_full_graph(name: str, in_full: Callable[..., fx.GraphModule]) -> None:
    model = ARCHITECTURES[name].build() if name in STAGED else deep(ARCHITECTURES[name])
    stamped, full = llfx.capture(model, verify=False), in_full(model, verify=False)
    require_same(stamped, full)
    kinds = [node.op for node in stamped.graph.nodes if node.op in ("get_attr", "placeholder")]
    assert kinds == sorted(kinds), "parameters are read before the inputs, because parameter work stands between"


@pytest.mark.broad
def test_adapters_in_a_stamped_graph_are_those_of_the_wrapper(log: Callable[[], str]) -> None:
    model = deep(ARCHITECTURES["llama"])
    graph = llfx.capture(model)
    assert f"{DEPTH} layers of model.layers: 1 kind, captured 3, stamped 2" in log()
    ids = torch.randint(2, 40, (2, 9))
    gm, wrapped = rewrite_and_wrap(graph, llfx.LoRA(r=2))
    check_rewrite_equals_wrap(model, gm, wrapped, (ids, torch.ones_like(ids)), 1e-9, seed=0)


def caches(rows: int, length: int, odd: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, length + (odd if i == ODD else 0), 4, generator=generator) for i in range(LAYERS)]


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, [ReturnsAll, ReturnsSome]))
def test_results_of_layers_are_stamped_too(
    cls: Any, in_full: Callable[..., fx.GraphModule], log: Callable[[], str]
) -> None:
    model = cls()
    stamped = llfx.capture(model, (torch.randn(3, 4),))
    assert "captured 3, stamped 5" in log()
    require_same(stamped, in_full(model, (torch.randn(3, 4),)))


@pytest.mark.broad
@pytest.mark.parametrize("cls", slow_unless(lambda cls: cls is WithCache, [WithCache, ReadsNeighbour, ReadsBackwards]))
def test_inputs_of_layers_are_stamped_too(
    cls: Any, in_full: Callable[..., fx.GraphModule], log: Callable[[], str]
) -> None:
    model = cls().eval()
    example = torch.randn(3, 2, 4), caches(3, 5)
    stamped = llfx.capture(model, example)
    assert ("captured 3, stamped 5" if cls is WithCache else "all layers captured, because") in log()
    full = in_full(model, example)
    # Which of several inputs a size of all of them is read from is another one.
    assert [(node.op, node.target, node.name) for node in stamped.graph.nodes] == [
        (node.op, node.target, node.name) for node in full.graph.nodes
    ]
    for rows, length in ((3, 5), (2, 7)):
        values = torch.randn(rows, 2, 4), caches(rows, length)
        for ours, expected in zip(stamped(*values), model(*values), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.broad
def test_an_input_of_a_stamped_layer_of_another_size_is_refused() -> None:
    """The graph of all layers takes it; the stamped one says that it does not, and does not compute something else."""
    model = WithCache().eval()
    gm: Any = llfx.capture(model, (torch.randn(3, 2, 4), caches(3, 5)))
    values = torch.randn(3, 2, 4), caches(3, 5, odd=2)
    with pytest.raises(llfx.CallError, match=r"\.shape == "):
        gm(*values)


@pytest.mark.broad
def test_a_layer_whose_input_has_another_size_is_captured_in_full(log: Callable[[], str]) -> None:
    model = WithCache().eval()
    values = torch.randn(3, 2, 4), caches(3, 5, odd=2)
    gm: Any = llfx.capture(model, values)
    assert "all layers captured, because" in log()
    torch.testing.assert_close(gm(*values), model(*values), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:A hook on")
@pytest.mark.parametrize("name", broad_after(1, slow_unless(PLANTED_EVERY_DAY.__contains__, PLANTED)))
def test_a_planted_difference_is_captured_in_full(
    name: str, in_full: Callable[..., fx.GraphModule], log: Callable[[], str]
) -> None:
    model = PLANTED[name]()
    example = (torch.randn(3, 4),)
    graph = llfx.capture(model, example)
    assert "all layers captured, because" in log() or name == "shared"  # one mode may be stamped, of those that differ
    require_same(graph, in_full(model, example))


def test_equal_layers_are_stamped(in_full: Callable[..., fx.GraphModule], log: Callable[[], str]) -> None:
    model = Stack()
    graph = llfx.capture(model, (torch.randn(3, 4),))
    assert "8 layers of layers: 1 kind, captured 3, stamped 5" in log()
    assert "all layers captured" not in log()
    require_same(graph, in_full(model, (torch.randn(3, 4),)))


def test_periods_are_stamped(in_full: Callable[..., fx.GraphModule], log: Callable[[], str]) -> None:
    model = Stack(layers=9)
    for layer in list(model.layers)[1::2]:
        layer.scale = 3.0  # type: ignore[assignment]
    graph = llfx.capture(model, (torch.randn(3, 4),))
    assert "9 layers of layers: 2 kinds, captured 5, stamped 4" in log()
    require_same(graph, in_full(model, (torch.randn(3, 4),)))


@pytest.mark.broad
def test_the_model_is_as_before_when_its_capture_fails() -> None:
    class Fails(Layer):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return super().forward(x, first) * len(x.unique().tolist())

    model = Stack(Fails)
    with pytest.raises(llfx.CaptureError, match="test_depth"):
        llfx.capture(model, (torch.randn(3, 4),))
    assert len(model.layers) == LAYERS


@pytest.mark.broad
def test_a_model_without_data_is_captured_like_one_with_data(log: Callable[[], str]) -> None:
    model = deep(ARCHITECTURES["llama"])
    sites = [row.name for row in llfx.inspect(model)]
    assert [row.name for row in llfx.inspect(model.to("meta"))] == sites
    assert log().count("stamped 2") == 2


def test_an_argument_may_be_left_out_if_all_layers_agree(log: Callable[[], str]) -> None:
    x = torch.randn(3, 4)
    gm, model = llfx.capture(Weighted(), (x, torch.rand(3, 4))), Weighted()
    assert "stamped" in log()
    model.load_state_dict(gm.state_dict(), strict=False)
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))


@pytest.mark.parametrize("odd", broad_after(1, [0, ODD]))
def test_an_argument_may_not_be_left_out_if_one_layer_computes_something_else(odd: int) -> None:
    gm = llfx.capture(Weighted(odd), (torch.randn(3, 4), torch.rand(3, 4)))
    with pytest.raises(llfx.CallError, match="weights cannot be left out, because the model then computes another"):
        gm(torch.randn(3, 4))
