"""`rewrite` says which weights its targets include that are not sites, and which sites default roles leave out."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.selection import broad_after

D = 8


class Block(nn.Module):
    """A feed-forward of known roles, a mixer of unknown role, and a weight that is not a site."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)
        self.mixer, self.steps = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        mixed = torch.cumsum(self.mixer(y), dim=1) + (self.steps.weight @ y.transpose(1, 2)).transpose(1, 2)
        return y + mixed.cos()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


X = torch.randn(2, 5, D)


@functools.cache
def model_and_base() -> tuple[nn.Module, fx.GraphModule]:
    model = Model()
    return model, llfx.capture(model, (X,))


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.filename == inspect.getfile(call) for warning in caught), "the warning points to the caller"
    return [str(warning.message) for warning in caught]


def logged(call: Callable[[], object]) -> list[str]:
    """Return the lines of the log that tell of sites without an adapter; there is no warning."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lora_lite_fx")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        assert warned(call) == []
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [line for line in lines if line.startswith("left without an adapter")]


def test_a_few_linears_of_unknown_role_are_a_line_of_the_log_and_no_warning() -> None:
    _, base = model_and_base()
    (line,) = logged(lambda: llfx.rewrite(base, llfx.LoRA(r=2)))
    assert "3 linears of unknown role (layers.*.mixer x 3; 192 parameters)" in line
    assert "The sites that get an adapter hold 576 parameters" in line
    assert r"LoRA(..., target_names=('mixer$',))" in line
    assert "head" not in line


class Wide(Model):
    """The model with a projection before its layers that holds more than they do, and a pooler after them."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.pooler = nn.Linear(60, D), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pooler(super().forward(torch.cos(self.projection(x)))))


def test_more_than_what_is_adapted_is_one_warning_that_names_how_to_target_it() -> None:
    model = Wide()
    cfgs = {"a": llfx.LoRA(r=2), "b": llfx.DoRA(r=2)}
    (message,) = warned(lambda: llfx.rewrite(model, cfgs, (torch.randn(2, 5, 60),)))
    assert "the default roles ('attention', 'mlp') leave out 4 linears of unknown role" in message
    assert "(projection, layers.*.mixer x 3; 672 parameters)" in message
    assert r"LoRA(..., target_names=('projection$', 'mixer$'))" in message
    assert "pooler" not in message
    assert "target_roles=('attention', 'mlp') leaves them out without this warning" in message
    adapted = llfx.rewrite(model, llfx.LoRA(r=2, target_names="projection"), (torch.randn(2, 5, 60),))
    (line,) = logged(lambda: llfx.rewrite(adapted, llfx.LoRA(r=2)))
    assert "projection" not in line, "it has an adapter already"


@pytest.mark.parametrize(
    "cfg",
    broad_after(
        1,
        [
            llfx.LoRA(r=2, target_roles=("attention", "mlp")),
            llfx.LoRA(r=2, target_names=("up", "down")),
            llfx.LoRA(r=2, exclude_names=("mixer",)),
            [llfx.LoRA(r=2), llfx.LoRA(r=2, target_names=("mixer$",))],
        ],
    ),
)
def test_what_the_user_has_decided_is_not_warned_about(cfg: llfx.LoRA | list[llfx.LoRA]) -> None:
    _, base = model_and_base()
    assert warned(lambda: llfx.rewrite(base, cfg)) == []


def test_layers_that_are_not_asked_for_are_not_named() -> None:
    _, base = model_and_base()
    (line,) = logged(lambda: llfx.rewrite(base, llfx.LoRA(r=2, layers=1)))
    assert "1 linear of unknown role (layers.*.mixer; 64 parameters)" in line


@pytest.mark.parametrize("front_door", [llfx.rewrite, llfx.wrap])
def test_targets_that_include_a_weight_that_is_not_a_site_are_warned_about(front_door: Callable[..., object]) -> None:
    _, base = model_and_base()
    (message,) = warned(lambda: front_door(base, llfx.LoRA(r=2, target_names=("mixer", "steps"))))
    assert "3 weights that its targets include are not sites" in message
    assert "layers.*.steps (it is `weight @ x`, with the inputs in the last dimension but one) x 3" in message
    role = warned(lambda: llfx.rewrite(base, llfx.LoRA(r=2, target_roles=("reader", "up"))))
    assert any("layers.*.steps" in message for message in role) == bool(
        {"reader", "up"} & set(llfx.inspect(base).left_out[0].roles)
    )


def test_targets_that_include_nothing_else_are_an_error_that_says_why() -> None:
    _, base = model_and_base()
    with pytest.raises(
        llfx.SelectionError, match=r"weights that are not sites: layers\.\*\.steps \(it is `weight @ x`"
    ):
        llfx.rewrite(base, llfx.LoRA(r=2, target_names=("steps",)))


@pytest.mark.broad
def test_what_symbolic_tracing_does_not_look_into_is_warned_about_by_role() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(self.encoder(x))
            return y

    model = Opaque()
    messages = warned(lambda: llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("mlp",))))
    assert any("encoder.self_attn.in_proj (symbolic tracing does not look into" in message for message in messages)
    assert not any("encoder" in message for message in warned(lambda: llfx.rewrite(model, llfx.LoRA(r=2), (X,))))
