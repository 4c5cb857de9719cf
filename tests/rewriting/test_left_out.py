"""`rewrite` says which weights its targets include that are not sites, and which linears default roles leave out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_lite_fx as llfx

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
    assert all(warning.filename == __file__ for warning in caught), "the warning points to the caller"
    return [str(warning.message) for warning in caught]


def test_default_roles_name_the_linears_of_unknown_role_by_layer_pattern_and_how_to_target_them() -> None:
    _, base = model_and_base()
    (message,) = warned(lambda: llfx.rewrite(base, llfx.LoRA(r=2)))
    assert "leave out 3 linears" in message
    assert "layers.*.mixer x 3" in message
    assert r"LoRA(..., target_names=('mixer$',))" in message
    assert "head" not in message
    assert "target_roles=('attention', 'mlp') leaves them out without this warning" in message


class Projected(Model):
    """The model with a projection before its layers, and a pooler after them."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.pooler = nn.Linear(D, D), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pooler(super().forward(torch.cos(self.projection(x)))))


def test_a_projection_before_the_layers_is_named_too_and_what_comes_after_them_is_not() -> None:
    model = Projected()
    (message,) = warned(lambda: llfx.rewrite(model, llfx.LoRA(r=2), (X,)))
    assert "leave out 4 linears" in message
    assert r"target_names=('projection$', 'mixer$')" in message
    assert "pooler" not in message


@pytest.mark.parametrize(
    "cfg",
    [
        llfx.LoRA(r=2, target_roles=("attention", "mlp")),
        llfx.LoRA(r=2, target_names=("up", "down")),
        llfx.LoRA(r=2, exclude_names=("mixer",)),
        [llfx.LoRA(r=2), llfx.LoRA(r=2, target_names=("mixer$",))],
    ],
)
def test_what_the_user_has_decided_is_not_warned_about(cfg: llfx.LoRA | list[llfx.LoRA]) -> None:
    _, base = model_and_base()
    assert warned(lambda: llfx.rewrite(base, cfg)) == []


def test_layers_that_are_not_asked_for_are_not_named() -> None:
    _, base = model_and_base()
    (message,) = warned(lambda: llfx.rewrite(base, llfx.LoRA(r=2, layers=1)))
    assert "leave out 1 linears" in message


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
