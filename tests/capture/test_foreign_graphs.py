"""Graphs of `torch.fx.symbolic_trace` and of Dynamo are adapted like captures, or an error says why they are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import close, output, randomise
from tests.support.selection import broad_after, slow_after


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.mix_weight = nn.Parameter(torch.randn(8, 8))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + F.linear(bias=None, weight=self.mix_weight, input=x)
        y: Tensor = x + self.drop(self.down(torch.tanh(self.up(x))))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


IDS, OTHER = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 0, 3, 8, 2], [4, 5, 0, 7, 7], [6, 6, 6, 1, 2]])


def net() -> Any:
    torch.manual_seed(0)
    return Net().double().eval()


def dynamo_export(model: nn.Module, **options: Any) -> Any:
    graph, _ = torch._dynamo.export(model, **options)(IDS)
    return graph


def in_backend(model: nn.Module) -> Any:
    """Return the graph that Dynamo passes to a backend."""
    graphs: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(IDS)
    return graphs[0]


SOURCES: list[Callable[[nn.Module], Any]] = [fx.symbolic_trace, dynamo_export]


@functools.cache
def graph_of(make: Callable[[nn.Module], Any]) -> Any:
    return make(net())


@functools.cache
def captured() -> fx.GraphModule:
    return llfx.capture(net(), (IDS,))


@pytest.mark.parametrize("make", broad_after(1, slow_after(2, SOURCES)), ids=lambda make: make.__name__)
@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.DoRA]))
def test_a_graph_of_torch_is_adapted_like_a_capture(cls: Any, make: Any, tmp_path: Path) -> None:
    model, graph, ours = net(), graph_of(make), captured()
    before = str(graph.graph)
    assert [(row.name, sorted(row.roles)) for row in llfx.inspect(graph)] == [
        (row.name, sorted(row.roles)) for row in llfx.inspect(ours)
    ]
    cfg: Any = cls(target_names=("blocks", "head"))
    gm, reference = llfx.rewrite(graph, cfg).eval(), llfx.rewrite(ours, cfg).eval()
    randomise(reference, 1)
    assert llfx.adapter_state_dict(gm).keys() == llfx.adapter_state_dict(reference).keys()
    llfx.save(reference, tmp_path / "adapter.safetensors")
    llfx.load_adapter_state_dict(gm, llfx.adapter_state_dict(reference))
    loaded = llfx.load(graph, tmp_path / "adapter.safetensors").eval()
    expected = output(reference, (OTHER,)).detach()
    for name, adapted in {"rewritten": gm, "loaded": loaded, "merged": llfx.merge(gm)}.items():
        close(output(adapted, (OTHER,)).detach(), expected, 1e-10, name)
    close(output(llfx.remove(gm), (OTHER,)).detach(), output(model, (OTHER,)).detach(), 0, "removed")
    assert str(graph.graph) == before, "the graph of the user has changed"


def test_a_dynamo_graph_has_the_names_of_the_model() -> None:
    gm = llfx.capture(graph_of(dynamo_export))
    assert {name for name, _ in gm.named_parameters()} == {name for name, _ in net().named_parameters()}


@pytest.mark.broad
def test_an_aten_graph_of_dynamo_has_the_names_of_the_modules() -> None:
    model = net()
    graph = dynamo_export(model, aten_graph=True)
    rows = {row.name: row.roles for row in llfx.inspect(graph)}
    assert {"blocks.0.q", "blocks.1.down", "head"} <= rows.keys()
    assert "query" in rows["blocks.0.q"]
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names=("blocks",))).eval()
    randomise(gm, 1)
    close(output(llfx.merge(gm), (OTHER,)).detach(), output(gm, (OTHER,)).detach(), 1e-10, "merged")


def test_dropout_of_a_traced_graph_follows_the_mode() -> None:
    gm = llfx.rewrite(graph_of(fx.symbolic_trace), llfx.LoRA(r=2))
    assert torch.equal(gm.eval()(IDS), gm(IDS))
    assert not torch.equal(gm.train()(IDS), gm(IDS))


def test_parameters_that_are_inputs_are_an_error_that_says_so() -> None:
    graph = in_backend(net())
    message = (
        r"The graph takes 25 parameters as inputs \(L_self_modules_embed_parameters_weight_\), as Dynamo passes them to"
        r" a backend, so it has no weights to adapt\. The way out: rewrite the model itself; or compile a model"
        r" that carries its adapters, torch\.compile\(lora_lite_fx\.backend\(cfg\)\.adapt\(model, \*inputs\),"
        r" backend='lora_lite_fx'\)\."
    )
    functions: list[Callable[[], Any]] = [
        lambda: llfx.rewrite(graph, llfx.LoRA()),
        lambda: llfx.capture(graph),
        lambda: llfx.inspect(graph),
    ]
    for function in functions:
        with pytest.raises(llfx.CaptureError, match=f"^{message}$"):
            function()


def test_a_linear_with_a_hook_stays_a_module_and_is_listed() -> None:
    model = net()
    model.blocks[0].q.register_forward_hook(lambda module, args, result: 2 * result)
    graph = fx.symbolic_trace(model)
    with pytest.warns(UserWarning, match=r"blocks\.\*\.q \(a hook stands on the module\)"):
        gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names=("blocks",)))
    assert "blocks.0.q.lora_A" not in llfx.adapter_state_dict(gm)
    close(output(gm.eval(), (IDS,)).detach(), output(model, (IDS,)).detach(), 0, "with the hook")


class Products(nn.Module):
    """Products whose arguments are passed by name, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.c = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(bias=self.b, weight=self.w, input=x) + torch.matmul(other=self.c, input=x)
        return y + torch.addmm(self.b, x, mat2=self.c, beta=0.5, alpha=2.0) + torch.mm(x, mat2=self.c)


@pytest.mark.parametrize("make", [lambda model: model, fx.symbolic_trace], ids=["module", "symbolic_trace"])
@pytest.mark.filterwarnings("ignore:LoRA. 1 weights")  # addmm with factors is not a site
def test_arguments_by_name_mean_what_they_say(make: Any) -> None:
    model, x = Products().double(), torch.randn(3, 8, dtype=torch.float64)
    gm = llfx.rewrite(make(model), llfx.LoRA(r=2, target_names=("w", "c")))
    close(gm(x), model(x), 1e-12, "at the start")
    randomise(gm, 1)
    close(output(llfx.merge(gm), (x,)), output(gm, (x,)).detach(), 1e-12, "merged")


def test_sites_of_an_exported_program_do_not_read_the_dropout_of_another_ones_adapter() -> None:
    """In evaluation its result is its input, which torch.export of torch 2.14 and later takes for one value."""
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    model = Block().double().eval()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, dropout=0.5, target_names=("q", "k", "v")), (x,)).eval()
    randomise(gm, 1)
    exported = torch.export.export(gm, (x,)).module()
    close(output(llfx.merge(exported), (x,)), output(gm, (x,)), 1e-10, "merged output")
    assert torch.equal(output(llfx.remove(exported), (x,)), output(model, (x,)))


def test_a_dropout_whose_numbers_are_keywords_is_left_as_it_is() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.a(torch.ops.aten.dropout.default(x, p=0.5, train=False))

    model, x = Drops().eval(), torch.randn(3, 4)
    gm = llfx.rewrite(fx.symbolic_trace(model), llfx.LoRA(r=2, target_names="a"))
    close(output(gm, (x,)), output(model, (x,)), 1e-6, "output")
