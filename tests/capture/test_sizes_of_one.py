"""A graph refuses a size of one with which its model computes something else, and takes it of all other models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from tests.support.conformance import close
from tests.support.models import ids, tiny_llama

CFG = llfx.LoRA(r=2, target_names=".")
EXAMPLE = (torch.randn(2, 3, 4),)


class Asks(nn.Module):
    """Adds one where a dimension has one element, which torch.export answers with no."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.fc = dim, nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        x = self.fc(x if y is None else x + y)
        return x + 1 if x.shape[self.dim] == 1 else x


class Layers(nn.Module):
    """A stack of layers, of which each decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Asks(1) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class ReadsShape(nn.Module):
    """Computes with its sizes, and decides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) / x.shape[1] + x.mean(1, keepdim=True).expand(-1, x.shape[1], -1)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_error_names_the_input_and_the_dimension(dim: int) -> None:
    model = Asks(dim)
    gm = llfx.rewrite(model, CFG, EXAMPLE)
    for shape in ((2, 3, 4), (5, 7, 4), (1, 7, 4), (5, 1, 4)):
        x = torch.randn(shape)
        if shape[dim] != 1:
            close(gm(x), model(x), 1e-6, "output")
            continue
        with pytest.raises(llfx.CallError, match=rf"x\.shape\[{dim}\] != 1, as in its example inputs"):
            gm(x)


def test_an_example_of_one_is_a_graph_for_one() -> None:
    model = Asks(1)
    gm = llfx.rewrite(model, CFG, (torch.randn(2, 1, 4),))
    x = torch.randn(5, 1, 4)
    close(gm(x), model(x), 1e-6, "output")


def test_inputs_of_one_size_are_tried_together() -> None:
    model = Asks(1)
    gm = llfx.rewrite(model, CFG, {"x": EXAMPLE[0], "y": EXAMPLE[0].clone()})
    with pytest.raises(llfx.CallError, match=r"shape\[1\] != 1"):
        gm(x=torch.randn(2, 1, 4), y=torch.randn(2, 1, 4))


def test_inputs_inside_a_list_are_tried() -> None:
    class OfList(Asks):
        def forward(self, x: Any, y: Any = None) -> Any:
            return super().forward(x[0]) + x[1]

    model = OfList(1)
    gm = llfx.rewrite(model, CFG, ([EXAMPLE[0], EXAMPLE[0].clone()],))
    with pytest.raises(llfx.CallError, match=r"shape\[1\] != 1"):
        gm([torch.randn(2, 1, 4), torch.randn(2, 1, 4)])


def test_layers_of_a_stack_decide() -> None:
    gm = llfx.rewrite(Layers(), CFG, EXAMPLE)
    with pytest.raises(llfx.CallError, match=r"x\.shape\[1\] != 1"):
        gm(torch.randn(2, 1, 4))


@pytest.mark.broad
def test_models_that_do_not_decide_take_a_size_of_one() -> None:
    model = ReadsShape()
    gm = llfx.rewrite(model, CFG, EXAMPLE)
    x = torch.randn(1, 1, 4)
    close(gm(x), model(x), 1e-6, "output")
    llama = LlamaForCausalLM(tiny_llama()).eval()
    graph = llfx.rewrite(llama, llfx.LoRA(r=2)).eval()
    with torch.no_grad():
        close(graph(input_ids=ids(1, 1)).logits, llama(input_ids=ids(1, 1)).logits, 1e-5, "logits")
