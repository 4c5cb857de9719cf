"""Models that need values to lie in memory in a certain order, and models that write to values where none is traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.quirks.generator_of_none import WithoutGeneratorOfNone
from lora_lite_fx.capture.quirks.layouts import KnownWhileTraced
from tests.support.conformance import check_rewrite_equals_wrap, small
from tests.support.releases import cases_by_name
from tests.support.selection import broad_after


class Model(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = first, nn.Linear(6, 4), between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.first(x)))
        return y


def rows_of_channels_last(x: Tensor) -> Tensor:
    """Return each pixel's channels as a row; view raises if the channels do not lie beside each other."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])


def blocks_of_transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).transpose(1, 2).view(x.shape[0], -1, 6)


def hidden_from_autograd(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(0.5)
    return x


def partly_overwritten(x: Tensor) -> Tensor:
    x = x.clone()
    with torch.no_grad():
        x[:, 0] = 0
        x[:, 1:].clamp_(min=-0.2)
    return x


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True)
        scale.clamp_(min=0.5)
    return x / scale


def filled_in(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :1] = x[:, :1].exp()
    y[:, 1:] = x[:, 1:] * 2
    return y


TABLE = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)


def of_a_table(x: Tensor) -> Tensor:
    with torch.no_grad():
        places = TABLE.index_select(0, torch.arange(x.shape[-1])).view(1, 1, -1)
    places = places.expand(x.shape[0], -1, -1).contiguous()
    places += 1
    return x * places


def of_detached(x: Tensor) -> Tensor:
    y = x.detach()
    y += 1  # writes to x, too
    return x


def images() -> tuple[Model, tuple[Tensor, ...], tuple[Tensor, ...]]:
    convolution = nn.Conv2d(3, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    shapes = ((2, 3, 4, 5), (3, 3, 6, 4))
    x, other = (torch.randn(*shape).double().to(memory_format=torch.channels_last) for shape in shapes)
    return Model(convolution, rows_of_channels_last), (x,), (other,)


@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.DoRA, llfx.IA3]))
def test_channels_that_must_lie_beside_each_other(cls: type[llfx.Variant]) -> None:
    model, x, other = images()
    model.double()
    check(model, small(cls, target_names=(".",)), x, other)


@pytest.mark.parametrize(
    "between",
    broad_after(
        3,
        [
            blocks_of_transposed,
            hidden_from_autograd,
            partly_overwritten,
            without_gradient,
            filled_in,
            of_a_table,
            of_detached,
        ],
    ),
)
@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.DoRA, llfx.IA3]))
def test_values_that_are_written_to(cls: type[llfx.Variant], between: Callable[[Tensor], Tensor]) -> None:
    model = Model(nn.Linear(5, 6), between).double()
    x, other = (torch.randn(*shape, 5, dtype=torch.float64) for shape in ((2, 3), (3, 4)))
    check(model, small(cls, target_names=(".",)), (x,), (other,))


def check(model: nn.Module, cfg: llfx.Variant, x: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    graph = llfx.capture(model, x)
    check_rewrite_equals_wrap(model, llfx.rewrite(graph, cfg), llfx.wrap(graph, cfg), other, 1e-10, seed=1)


class OfHelper(nn.Module):
    """Adds indices that are made by `make` from its sizes."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return x + self.make(x.shape[0])[:, None] + self.make(4)


def test_how_many_patches_are_merged_is_a_part_of_the_graph() -> None:
    gm = llfx.capture(cases_by_name()["video_llama_3_vision"].builder()())
    assert {"pixel_values"} == {node.target for node in gm.graph.find_nodes(op="placeholder")}


@pytest.mark.parametrize("file", ["transformers.vision_utils", "elsewhere"])
def test_what_a_helper_of_transformers_makes_of_numbers_alone_is_known_in_a_trace(file: str) -> None:
    make = eval("lambda size: torch.arange(size)", {"__name__": file, "torch": torch})
    with WithoutGeneratorOfNone(), KnownWhileTraced(), WithoutGeneratorOfNone():
        program = torch.export.export(OfHelper(make), (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    made = [node for node in program.graph.nodes if "arange" in str(node.target)]
    assert len(made) == (1 if file == "transformers.vision_utils" else 2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.module()(x), OfHelper(torch.arange)(x))
