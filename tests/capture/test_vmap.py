"""A base that calls `torch.vmap` is adapted inside and outside of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import lora_lite_fx as llfx
from lora_lite_fx.compat import dynamo
from tests.support.conformance import check_rewrite_equals_wrap, close, output, randomise, small
from tests.support.selection import broad_after


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.b = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.vmap(torch.dot)(x[0], x[1])
        y: Tensor = self.b(torch.tanh(torch.vmap(self.a)(x)))
        return y + norms[:, None]


@pytest.mark.parametrize("cls", broad_after(2, [llfx.LoRA, llfx.DoRA, llfx.IA3, llfx.OFT, llfx.HRA]))
def test_levels_of_vmap_stay_in_the_graph(cls: type[llfx.Variant]) -> None:
    model = Mapped().double()
    x, other = (torch.randn(*shape, 8, dtype=torch.float64) for shape in ((2, 5), (3, 4)))
    graph = llfx.capture(model, (x,))
    cfg = small(cls, target_names=(".",))
    gm, wrapped = llfx.rewrite(graph, cfg), llfx.wrap(graph, cfg)
    check_rewrite_equals_wrap(model, gm, wrapped, (other,), 1e-10, seed=1)
    close(output(llfx.merge(gm), (other,)), output(gm, (other,)).detach(), 1e-10, "merged")
    close(output(llfx.remove(gm), (other,)), output(model, (other,)).detach(), 1e-12, "removed")


class Indexed(nn.Module):
    """Indexes inside `vmap` as transformers makes masks of padding (T5Gemma 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.a(x).sum(-1)

        def cell(row: Tensor, column: Tensor) -> Tensor:
            product: Tensor = hidden[row, column] * mask[row, column]
            return product

        with TransformGetItemToIndex():
            rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
            result: Tensor = torch.vmap(lambda row: torch.vmap(lambda column: cell(row, column))(columns))(rows)
        return result


def test_a_release_that_calls_the_indexing_function_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "MOD_INDEX", "")
    with pytest.raises(llfx.CaptureError, match=r"recorded torch\.\S+ModIndex by its name.* The way out"):
        llfx.capture(Indexed(), (torch.randn(3, 7, 8), torch.rand(3, 7) > 0.3))


@pytest.mark.broad
def test_what_is_indexed_inside_vmap_compiles() -> None:
    model = Indexed().double()
    first, other = (
        (torch.randn(*shape, 8, dtype=torch.float64), torch.rand(shape) > 0.3) for shape in ((3, 7), (2, 5))
    )
    graph, cfg = llfx.capture(model, first), llfx.LoRA(r=2, target_names=("a",))
    gm, wrapped = llfx.rewrite(graph, cfg), llfx.wrap(graph, cfg)
    check_rewrite_equals_wrap(model, gm, wrapped, other, 1e-10, seed=1)
    randomise(gm, 1)
    expected: Tensor = gm(*other)
    compiled: Tensor = torch.compile(gm, fullgraph=True, backend="aot_eager", dynamic=True)(*other)
    close(compiled.detach(), expected.detach(), 1e-12, "compiled")
    of_graph, of_compiled = (
        torch.autograd.grad(each.square().sum(), llfx.adapter_parameters(gm)) for each in (expected, compiled)
    )
    for one, two in zip(of_graph, of_compiled, strict=True):
        close(two, one, 1e-12, "gradients")
