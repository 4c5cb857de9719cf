"""Linears whose role is in doubt get none, and inserted adapters change no role."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.sites.roles import ROLES
from tests.sites.test_roles_blocks import (
    CLASSES,
    INNER,
    MLP,
    WIDTH,
    Attend,
    Attention,
    FusedProjection,
    GatedMLP,
    both_captures,
    example,
    fused,
    join_heads,
    operators,
    split_heads,
)
from tests.sites.test_roles_of_models import check_table, parse, roles_of
from tests.support.conformance import calibration, representatives
from tests.support.selection import slow_after

# Blocks that look like attention or feed-forward, and are neither.


class PlainMLP(nn.Module):
    """Linears without a residual. An activation between two linears does not prove a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(WIDTH, INNER),
            nn.Linear(INNER, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Any:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Router(nn.Module):
    """Two experts, mixed by a softmax that `mix` applies."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.router = nn.Linear(WIDTH, 2)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack((self.left(x), self.right(x)), dim=-2)
        return x + self.mix(torch.softmax(self.router(x), dim=-1), experts)


ROUTED = {
    "elementwise": lambda p, experts: (p.unsqueeze(-1) * experts).sum(-2),
    "matmul": lambda p, experts: (p.unsqueeze(-2) @ experts).squeeze(-2),
    "einsum": lambda p, experts: torch.einsum("bte,bted->btd", p, experts),
}


def einsum_with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...qd,...kd->...qk", q, k).softmax(3) @ v


def einsum_of_lists(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4]).softmax(-1) @ v


class SoftmaxClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.out(x + self.fc(x)), dim=-1)


class LyingNames(nn.Module):
    """Attention with the names of a feed-forward block, and a feed-forward block with the names of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.gate_proj, self.lm_head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up_proj = nn.Linear(WIDTH, WIDTH)
        self.q_proj, self.o_proj = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.v_proj = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        heads = split_heads(self.down_proj(x)), split_heads(self.gate_proj(x)), split_heads(self.lm_head(x))
        x = x + self.up_proj(join_heads(fused(*heads)))
        x = x + self.o_proj(F.gelu(self.q_proj(x)))
        return self.v_proj(x)


LIES = """
down_proj   query reader     8   8
gate_proj   key reader       8   8
lm_head     value reader     8   8
up_proj     output writer    8   8
q_proj      up reader        8  12
o_proj      down writer     12   8
v_proj      head reader      8   5
"""


@both_captures
def test_feed_forward_without_a_residual_is_unknown_but_for_the_head(exported: bool) -> None:
    model = PlainMLP()
    table = llfx.inspect(model, example(model, exported))
    check_table(table, "fc1 - 8 12\nfc2 - 12 8\nfc3 head 8 5")
    assert "unknown" in str(table)
    with pytest.raises(llfx.SelectionError, match=r"default roles.*with the roles: head"):
        llfx.rewrite(model, llfx.LoRA(r=2), example(model, exported))


@both_captures
@pytest.mark.parametrize("mix", ROUTED)
def test_a_softmax_that_routes_is_not_attention(mix: str, exported: bool) -> None:
    model = Router(ROUTED[mix])
    for row in llfx.inspect(model, example(model, exported)):
        assert not {"query", "key", "value", "output", "gate", "up", "down"} & set(row.roles), row


@both_captures
@pytest.mark.parametrize("attend", [einsum_with_ellipsis, einsum_of_lists])
def test_an_einsum_that_is_hard_to_read_gives_no_wrong_role(attend: Attend, exported: bool) -> None:
    model = Attention(attend)
    roles = roles_of(llfx.inspect(model, example(model, exported)))
    for name, role in {"q": "query", "k": "key", "v": "value"}.items():
        assert roles[name][0] <= {role, "reader"}, roles


@both_captures
def test_a_softmax_over_classes_is_not_attention_and_its_linear_is_the_head(exported: bool) -> None:
    model = SoftmaxClassifier()
    check_table(llfx.inspect(model, example(model, exported)), "fc reader writer 8 8\nout head reader 8 5")


@both_captures
def test_names_that_lie_do_not_mislead(exported: bool) -> None:
    model = LyingNames()
    check_table(llfx.inspect(model, example(model, exported)), LIES)


# Roles with adapters in the graph.


def without_head(block: Any) -> Any:
    """Replace the head of the block by the identity, and return the block."""
    block.head = nn.Identity()
    return block


class Layer(nn.Module):
    """Attention and a gated feed-forward, both with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = without_head(FusedProjection()), without_head(GatedMLP())

    def forward(self, x: Tensor) -> Any:
        return self.mlp(self.attention(x))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LAYER = """
layers.{0}.attention.qkv    query key value reader    8  24
layers.{0}.attention.o      output writer             8   8
layers.{0}.mlp.gate         gate reader               8  12
layers.{0}.mlp.up           up reader                 8  12
layers.{0}.mlp.down         down writer              12   8
"""
HEAD = "head head reader 8 5"


@pytest.mark.broad
@both_captures
def test_a_layer_called_twice_has_the_roles_of_two_layers(exported: bool) -> None:
    layer = Layer()
    shared, apart = Stack([layer, layer]), Stack([Layer(), Layer()])
    check_table(llfx.inspect(shared, example(shared, exported)), LAYER.format(0) + HEAD)
    check_table(llfx.inspect(apart, example(apart, exported)), LAYER.format(0) + LAYER.format(1) + HEAD)


def config(cls: type[llfx.Variant], r: int = 4) -> llfx.Variant:
    """Return a variant for every site of the layers, in blocks that fit the small widths."""
    names = [field.name for field in dataclasses.fields(cls)]
    sizes: dict[str, Any] = {name: 4 for name in names if name.endswith(("_size", "_length"))} | {
        name: r for name in names if name == "r"
    }
    return cls(target_names=("layers",), target_kinds=("linear",), **sizes)


CONFIGS = [[config(cls)] for cls in representatives().values()] + [[config(llfx.LoRA, 2), config(llfx.HRA, 2)]]


@functools.cache
def captured(exported: bool) -> nn.Module:
    """Return a graph without adapters that has both kinds of attention and of feed-forward."""
    model = Stack([Layer(), without_head(Attention(operators)), without_head(MLP())])
    return llfx.capture(model, example(model, exported))


@pytest.mark.broad
@both_captures
@pytest.mark.parametrize(
    "cfg",
    slow_after(1, CONFIGS),
    ids=lambda cfg: "+".join(type(variant).__name__ for variant in cfg),
)
def test_inserting_adapters_changes_no_role(cfg: list[llfx.Variant], exported: bool) -> None:
    before = llfx.inspect(captured(exported))
    data = calibration(cfg, None, (torch.randn(8, 3, WIDTH, generator=torch.Generator().manual_seed(0)),))
    after = llfx.inspect(llfx.rewrite(captured(exported), cfg, calibration=data))
    assert roles_of(after) == roles_of(before)
    names = tuple(type(variant).__name__ for variant in cfg)
    assert all(row.adapters == (() if row.name == "head" else names) for row in after)
    assert roles_of(before).items() >= parse(LAYER.format(0)).items()
    assert len(before) == 5 + 4 + 2 + 1
    assert {role for row in before for role in row.roles} == set(ROLES) - {"router", "inner"}
