"""Check that a model captured by a few of its layers has the graph of a capture of all layers, node for node."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.outputs import written_tensors
from tests.support.architectures import DECODERS, Architecture
from tests.support.architectures_others import OTHERS
from tests.support.conformance import check_rewrite_equals_wrap, rewrite_and_wrap
from tests.support.selection import slow_unless

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
            patch.setattr(importlib.import_module("lora_lite_fx.capture.depth"), "stacks_of", lambda model: {})
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


@pytest.mark.parametrize("name", slow_unless(lambda name: name in EVERY_DAY, ARCHITECTURES))
def test_stamped_graph_is_the_full_graph(name: str, in_full: Callable[..., fx.GraphModule]) -> None:
    model = ARCHITECTURES[name].build() if name in STAGED else deep(ARCHITECTURES[name])
    stamped, full = llfx.capture(model, verify=False), in_full(model, verify=False)
    require_same(stamped, full)
    kinds = [node.op for node in stamped.graph.nodes if node.op in ("get_attr", "placeholder")]
    assert kinds == sorted(kinds), "parameters are read before the inputs, because parameter work stands between"


def test_adapters_in_a_stamped_graph_are_those_of_the_wrapper(log: Callable[[], str]) -> None:
    model = deep(ARCHITECTURES["llama"])
    graph = llfx.capture(model)
    assert f"{DEPTH} layers of model.layers: 1 kind, captured 3, stamped 2" in log()
    ids = torch.randint(2, 40, (2, 9))
    gm, wrapped = rewrite_and_wrap(graph, llfx.LoRA(r=2))
    check_rewrite_equals_wrap(model, gm, wrapped, (ids, torch.ones_like(ids)), 1e-9, seed=0)


# Planted differences: one layer of many is another one, and a capture of the first layers does not show it.

LAYERS, ODD = 8, 6


class Layer(nn.Module):
    """A layer that knows its number, as those of transformers do."""

    offset: Tensor

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.scale = 2.0
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("offset", torch.ones(4))
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.up(self.norm(x) * self.scale)) + self.offset)
        return x + y * first.shape[0]


class Stack(nn.Module):
    """A model of such layers, called in a loop."""

    def __init__(self, odd: type[Layer] = Layer, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((odd if index == ODD else Layer)(index) for index in range(layers))

    def forward(self, x: Tensor) -> Any:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x


class OtherConstant(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = 3.0


class OtherDropout(Layer):
    """It differs in training only."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.dropout.p = 0.2


class OtherInEvaluation(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x, first) if self.training else super().forward(x, first) + 1


class BranchesOnIndex(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x.tanh() if self.index > 5 else x, first)


class ReadsAnother(Layer):
    """It reads the first value and not the one before."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(first, first) + 0 * x


class BranchesOnSize(Layer):
    """It differs for more rows than those of the example, which its graph must refuse."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y = super().forward(x, first)
        return y.tanh() if x.shape[0] > 100 else y


class BranchesOnFloat(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y = super().forward(x, first)
        return y.tanh() if (2 * x.shape[0]) ** 0.5 > 100 else y


class TakesNumberForSize(Layer):
    """It multiplies by 3, which is also the number of rows of the example."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.up(self.norm(x) * self.scale)) + self.offset)
        return x + y * 3


class OwnTable(Layer):
    """It reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.table = torch.ones(4)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x + self.table, first)


class EveryTable(Stack):
    """Each layer reads such a tensor, of which one has other values."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x) + layer.table
        return x


class WritesBuffer(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        self.offset.add_(1)
        return super().forward(x, first)


class OtherShape(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("offset", torch.ones(1))


class OtherDtype(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("offset", torch.ones(4, dtype=torch.int64))


class WithoutGradient(Layer):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x, first)


class Counts(Stack):
    """The model itself looks at the number of a layer."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x * (2 if number == ODD else 1), first)
        return x


class CountsFromEnd(Stack):
    """Its last layer but one is another one, also if there are fewer."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x.tanh() if number == len(self.layers) - 2 else x, first)
        return x


class DividesByNumber(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x / len(self.layers)


class ReadsMiddle(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        seen = []
        for layer in self.layers:
            x = layer(x, first)
            seen.append(x)
        return x + seen[4]


class ReturnsOneChanged(Stack):
    def forward(self, x: Tensor) -> list[Tensor]:
        first = x
        seen = []
        for index, layer in enumerate(self.layers):
            x = layer(x, first)
            seen.append(x + 1 if index == ODD else x)
        return seen


class Straight(torch.autograd.Function):
    """A function with the operators of a layer, and with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5.0


class Differentiates(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, layer in enumerate(self.layers):
            x = layer(Straight.apply(x) if index == ODD else x * 2.0, first)  # type: ignore[no-untyped-call]
        return x


class Backwards(Stack):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in reversed(self.layers):
            x = layer(x, first)
        return x


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(super().forward(x))
        return y


def _tied() -> Stack:
    model = Stack()
    model.layers[ODD].up.weight = model.layers[0].up.weight  # type: ignore[union-attr]
    return model


def _shared() -> Stack:
    model = Stack()
    model.layers[ODD] = model.layers[1]
    return model


def _hooked() -> Stack:
    model = Stack()
    model.layers[ODD].register_forward_hook(lambda module, args, result: result * 2)
    return model


def _other_table() -> Stack:
    model = EveryTable()
    model.layers[ODD].table = torch.ones(4)
    return model


PLANTED: dict[str, Callable[[], nn.Module]] = {
    **{
        odd.__name__: lambda odd=odd: Stack(odd)  # type: ignore[misc]
        for odd in (
            OtherConstant, OtherDropout, OtherInEvaluation, BranchesOnIndex, ReadsAnother, BranchesOnSize,
            BranchesOnFloat, TakesNumberForSize, OwnTable, WritesBuffer, OtherShape, OtherDtype, WithoutGradient,
        )
    },
    **{
        cls.__name__: cls
        for cls in (
            Counts, CountsFromEnd, DividesByNumber, ReadsMiddle, ReturnsOneChanged, Differentiates, Backwards, Twice
        )
    },
    "tied": _tied, "shared": _shared, "hooked": _hooked, "other table": _other_table,
}  # fmt: skip


class ReturnsAll(Stack):
    """A model that returns what each layer computes, the last layer first."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = x
        seen = []
        for layer in self.layers:
            x = layer(x, first)
            seen.append(x)
        return seen[::-1]


class ReturnsSome(ReturnsAll):
    def forward(self, x: Tensor) -> list[Tensor]:
        seen = super().forward(x)[::-1]
        return [*seen[::3], seen[-1]]


class CachingLayer(Layer):
    def forward(self, x: Tensor, cache: Tensor) -> Any:
        joined = torch.cat([cache, x], 1)
        return super().forward(x, x) + joined.mean(1, keepdim=True), joined


class WithCache(Stack):
    """A model whose layers each have an input and a result of their own, as caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CachingLayer(index) for index in range(LAYERS))

    def number_of_cache(self, index: int) -> int:
        return index

    def forward(self, x: Tensor, caches: list[Tensor]) -> Any:  # type: ignore[override]
        caches = [*caches]
        x = x * caches[0].shape[1]
        for index, layer in enumerate(self.layers):
            number = self.number_of_cache(index)
            x, caches[number] = layer(x, caches[number])
        return x, caches


class ReadsNeighbour(WithCache):
    def number_of_cache(self, index: int) -> int:
        return index - 1 if index == ODD else index


class ReadsBackwards(WithCache):
    def number_of_cache(self, index: int) -> int:
        return len(self.layers) - 1 - index


def caches(rows: int, length: int, odd: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, length + (odd if i == ODD else 0), 4, generator=generator) for i in range(LAYERS)]


@pytest.mark.parametrize("cls", [ReturnsAll, ReturnsSome])
def test_results_of_layers_are_stamped_too(
    cls: Any, in_full: Callable[..., fx.GraphModule], log: Callable[[], str]
) -> None:
    model = cls()
    stamped = llfx.capture(model, (torch.randn(3, 4),))
    assert "captured 3, stamped 5" in log()
    require_same(stamped, in_full(model, (torch.randn(3, 4),)))


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


def test_an_input_of_a_stamped_layer_of_another_size_is_refused() -> None:
    """The graph of all layers takes it; the stamped one says that it does not, and does not compute something else."""
    model = WithCache().eval()
    gm: Any = llfx.capture(model, (torch.randn(3, 2, 4), caches(3, 5)))
    values = torch.randn(3, 2, 4), caches(3, 5, odd=2)
    with pytest.raises(AssertionError, match="has not the size of"):
        gm(*values)


def test_a_layer_whose_input_has_another_size_is_captured_in_full(log: Callable[[], str]) -> None:
    model = WithCache().eval()
    values = torch.randn(3, 2, 4), caches(3, 5, odd=2)
    gm: Any = llfx.capture(model, values)
    assert "all layers captured, because" in log()
    torch.testing.assert_close(gm(*values), model(*values), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:A hook on")
@pytest.mark.parametrize("name", slow_unless(PLANTED_EVERY_DAY.__contains__, PLANTED))
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


def test_the_model_is_as_before_when_its_capture_fails() -> None:
    class Fails(Layer):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return super().forward(x, first) * len(x.unique().tolist())

    model = Stack(Fails)
    with pytest.raises(llfx.CaptureError, match="test_depth"):
        llfx.capture(model, (torch.randn(3, 4),))
    assert len(model.layers) == LAYERS


def test_a_model_without_data_is_captured_like_one_with_data(log: Callable[[], str]) -> None:
    model = deep(ARCHITECTURES["llama"])
    sites = [row.name for row in llfx.inspect(model)]
    assert [row.name for row in llfx.inspect(model.to("meta"))] == sites
    assert log().count("stamped 2") == 2
