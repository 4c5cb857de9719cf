"""`share_siblings`: adapters that read one input form one product with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    ShareSiblings,
)
from tests.support.conformance import close, output, randomise
from tests.support.low_rank_llama import adapted_llama
from tests.support.models import WIDTH, SharedLinear
from tests.support.programs import (
    PAIR,
    PLAIN,
    SINGLY,
    X,
    adapted,
    after,
    count,
    derived,
    edits,
    in_calls,
    reasons,
)

aten = torch.ops.aten


def test_siblings_of_several_variants_share_a_product_and_what_is_dropped_does_not() -> None:
    names: list[dict[str, Any]] = [{"target_names": (name,)} for name in ("q$", "k$", "v$")]
    q, k, v = names
    mixed = adapted([llfx.LoRA(r=2, **q), llfx.DeLoRA(r=3, **k), llfx.HRA(r=2, **v), llfx.LoRA(r=1, **k)], blocks=PAIR)
    (product,) = [node for node in derived(mixed).graph.nodes if node.target is aten.split_with_sizes.default]
    assert sorted(product.args[1]) == [1, 2, 2, 3]
    dropped = adapted([llfx.LoRA(r=2, dropout=0.5, **q), llfx.LoRA(r=2, **k), llfx.LoRA(r=2, **v)], blocks=PAIR)
    sizes_of_program: dict[Any, list[int]] = {"training": [2, 2], "inference": [2, 2, 2]}
    for program, sizes in sizes_of_program.items():
        gm = derived(dropped, SINGLY.of(program))
        (product,) = [node for node in gm.graph.nodes if node.target is aten.split_with_sizes.default]
        assert product.args[1] == sizes


def test_calls_of_one_module_share_the_stack_of_its_matrices() -> None:
    cfg = [llfx.LoRA(r=2, target_names=("mix",)), llfx.LoRA(r=3, target_names=("mix",))]
    gm = derived(adapted(cfg, blocks=(SharedLinear,)))
    assert (count(gm, aten.split_with_sizes.default), count(gm, aten.cat.default)) == (2, 1)
    assert set(edits(gm).values()) == {0}


def test_casts_of_one_input_are_one() -> None:
    gm = adapted(llfx.LoRA(r=2, target_names=("[qkv]$",)), blocks=PAIR, dtype=torch.bfloat16)
    assert in_calls(gm)[aten.to.dtype] == 3
    assert in_calls(derived(gm))[aten.to.dtype] == 1
    assert in_calls(derived(gm))[aten.type_as.default] == 3  # of the sums
    assert in_calls(derived(gm))[aten.linear.default] == 1 + 3


class Overwrites(nn.Module):
    """Two linears of one tensor, which is overwritten between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        x = x + 1
        y = self.one(x)
        x.mul_(0.5)
        return y * self.two(x)


class WritesBetween(Overwrites):
    """Two linears of one tensor, and a write to another tensor between them."""

    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        z = x * 2
        z.add_(1)
        return y * self.two(x) * z.sum()


def test_siblings_of_an_overwritten_input_share_nothing() -> None:
    gm = llfx.rewrite(Overwrites(), llfx.LoRA(r=2, target_names=(".",)), (torch.ones(2, WIDTH),))
    randomise(gm, 1)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(gm(x), llfx.optimize(gm, PLAIN)(x), 1e-6, "output")
    assert edits(derived(gm, PLAIN))["share_siblings"] == 0


def test_three_products_become_one_that_is_split() -> None:
    gm = adapted(llfx.LoRA(r=2, target_names=("[qkv]$",)), blocks=PAIR)
    shared, report = after(gm, ShareSiblings())
    assert report.edits == 1
    assert reasons(report) == []
    assert (in_calls(gm)[aten.linear.default], in_calls(shared)[aten.linear.default]) == (3 + 3, 1 + 3)
    assert (count(gm, aten.split_with_sizes.default), count(shared, aten.split_with_sizes.default)) == (0, 1)
    with torch.no_grad():
        close(output(shared, X), output(gm, X), 1e-9, "output")


def test_the_reason_is_what_keeps_products_apart() -> None:
    one_dropped = [llfx.LoRA(r=2, dropout=0.5, target_names=("q$",)), llfx.LoRA(r=2, target_names=("k$",))]
    cases: list[tuple[Any, list[str]]] = [
        (llfx.LoRA(r=2, target_names=("out$",)), ["blocks.0.out: no other adapter of the layer reads this input"]),
        (
            one_dropped,
            ["blocks.0.q, blocks.0.k: different inputs: dropout or casts come before the products"],
        ),
        (
            llfx.PiSSA(r=2, target_names=("[qk]$",)),
            ["blocks.0.q, blocks.0.k: one adapter's products must be rounded alike"],
        ),
    ]
    for cfg, expected in cases:
        _, report = after(adapted(cfg, blocks=PAIR), ShareSiblings())
        assert (report.edits, reasons(report)) == (0, expected)
    _, report = after(adapted_llama("LoRA"), ShareSiblings())
    layers = [f"model.layers.{i}" for i in range(2)]
    assert reasons(report) == [f"{at}.self_attn.o_proj, {at}.mlp.down_proj: different inputs" for at in layers]
    for model, why in ((Overwrites(), "different inputs"), (WritesBetween(), "a tensor is overwritten in between")):
        gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=(".",)), (torch.ones(2, WIDTH),))
        assert reasons(after(gm, ShareSiblings())[1]) == [f"one, two: {why}"]
