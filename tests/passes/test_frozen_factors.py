"""A factor of an adapter that is frozen has no gradient, so a program keeps nothing for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_lite_fx as llfx
from lora_lite_fx.ops.dropped_product import DroppedProduct
from lora_lite_fx.ops.low_rank_branch import Branch, flatten
from lora_lite_fx.ops.low_rank_products import LowRankProducts
from lora_lite_fx.ops.rotated_blocks import RotatedBlocks
from lora_lite_fx.ops.rotated_pairs import rotated_pairs_at_once
from tests.support.conformance import close, randomise
from tests.support.low_rank_llama import EVERYWHERE, llama, run, tokens
from tests.support.programs import PLAIN
from tests.support.saved import saved_by, saved_bytes
from tests.support.selection import broad_after, slow_after


def kept(cfg: llfx.Variant, memory: Any = None) -> tuple[int, int]:
    """Return the bytes that a call in training saves: of the program, and of the plain graph."""
    gm = llfx.rewrite(llama(dtype=torch.float32)[1], cfg, memory=memory).train()
    randomise(gm, 1)
    return saved_by(gm, tokens(64, 8)), saved_by(llfx.optimize(gm, PLAIN), tokens(64, 8))


@pytest.mark.broad
@pytest.mark.parametrize("dropout", slow_after(1, [0.25, 0.0]))
@pytest.mark.parametrize("cls", slow_after(1, [llfx.LoRA, llfx.DoRA, llfx.PiSSA]))
def test_a_frozen_first_factor_takes_less_than_a_trained_one(cls: Any, dropout: float) -> None:
    frozen = cls(r=8, train_A=False, dropout=dropout, **EVERYWHERE)
    ours, plain = kept(frozen)
    assert ours < kept(dataclasses.replace(frozen, train_A=True))[0]
    assert ours < plain


@pytest.mark.broad
@pytest.mark.parametrize("memory", broad_after(1, ["fast", "balanced", 0.5]))
def test_it_does_with_plans_of_memory_too(memory: Any) -> None:
    frozen = llfx.LoRA(r=8, train_A=False, **EVERYWHERE)
    assert kept(frozen, memory)[0] <= kept(dataclasses.replace(frozen, train_A=True), memory)[0]


OTHERS = {
    "RandLoRA": llfx.RandLoRA(r=4, **EVERYWHERE),
    "PSOFT": llfx.PSOFT(r=4, **EVERYWHERE),
    "LoRAXS": llfx.LoRAXS(r=4, **EVERYWHERE),
    "TinyLoRA": llfx.TinyLoRA(r=4, **EVERYWHERE),
    "VeRA": llfx.VeRA(r=4, **EVERYWHERE),
    "VBLoRA": llfx.VBLoRA(r=4, vector_length=8, **EVERYWHERE),
}


@pytest.mark.parametrize("name", broad_after(2, OTHERS))
def test_variants_with_frozen_factors_keep_no_more_than_plain_products(name: str) -> None:
    ours, plain = kept(OTHERS[name])
    assert ours < plain


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_gradients_are_those_of_plain_products(dropout: float) -> None:
    gm = llfx.rewrite(llama()[1], llfx.LoRA(r=2, train_A=False, dropout=dropout, **EVERYWHERE)).train()
    randomise(gm, 1)
    results = []
    parameters = llfx.adapter_parameters(gm)
    for graph in (gm, llfx.optimize(gm, PLAIN)):
        torch.manual_seed(3)
        with sdpa_kernel(SDPBackend.MATH):
            y = run(graph, 3, 4)()
            first = torch.autograd.grad(y.square().mean(), parameters, create_graph=True)
            norm: Any = sum(gradient.square().sum() for gradient in first)
            results.append([y, *first, *torch.autograd.grad(norm, parameters)])
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, 1e-5, "result")


# The operations.


def tensor(*shape: int, trained: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trained)


@pytest.mark.parametrize("a_trained", [False, True])
@pytest.mark.parametrize("b_trained", [False, True])
def test_gathered_products_save_the_input_for_a_and_the_narrow_product_for_b(a_trained: bool, b_trained: bool) -> None:
    x, a, b = tensor(7, 5), tensor(2, 5, trained=a_trained), tensor(6, 2, trained=b_trained)
    weight = tensor(6, 5, trained=False)
    products = LowRankProducts((2,), (1.5,))

    def call(*operands: Tensor) -> tuple[Tensor, ...]:
        x, a, b = operands
        return products(x, a, *flatten([Branch(weight, None, b, None)]))

    saved = saved_bytes(lambda: call(x, a, b), (a, b, weight))
    assert saved == 8 * (7 * 5 * a_trained + 7 * 2 * b_trained)
    assert torch.autograd.gradcheck(call, (x, a, b))
    assert torch.autograd.gradgradcheck(call, (x, a, b))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert torch.autograd.gradgradcheck(call, (x, a, b))
    (of_x,) = torch.autograd.grad(call(x, a, b)[1].sum(), x)  # without a gradient of the narrow product
    close(of_x, torch.ones(7, 6, dtype=torch.float64) @ (weight + 1.5 * b @ a).detach(), 1e-12, "x")


class Dropped(torch.autograd.Function):
    """An operation that has no gradient to give back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> None:
        return None


@pytest.mark.parametrize("several", [False, True])
def test_results_without_a_gradient_give_none(several: bool) -> None:
    x, a = tensor(7, 5), tensor(2, 5)
    branches = [Branch(tensor(6, 5, trained=False), None, tensor(6, 2), None)] if several else []
    products = LowRankProducts((2,), (1.5,)) if several else LowRankProducts()
    result: Any = Dropped.apply(products(x, a, *flatten(branches))[-1])  # type: ignore[no-untyped-call, unused-ignore]
    gradients: tuple[Any, ...] = torch.autograd.grad(result.sum(), [x, a], allow_unused=True)
    assert gradients == (None, None)


def test_sources_of_the_input_are_not_saved_for_a_frozen_a() -> None:
    source, a = tensor(7, 5, trained=False), tensor(2, 5, trained=False)
    x = source.sin().requires_grad_()

    def recipe(_: None, source: Tensor) -> tuple[Tensor]:
        return (source.sin(),)

    assert saved_bytes(lambda: LowRankProducts(recipe=recipe, sources=1)(x, a, source), (a,)) == 0
    assert (
        saved_bytes(lambda: DroppedProduct(0.5, recipe=recipe, sources=1)(x, a, source, True), (a,)) == 5
    )  # a bit for each element


def test_dropout_before_a_frozen_factor_saves_the_mask_alone() -> None:
    x, a = tensor(16, 5), tensor(2, 5, trained=False)

    def product(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return DroppedProduct(0.4)(x, a, True)

    assert saved_bytes(lambda: product(x), (a,)) == 16 * 5 // 8
    assert torch.autograd.gradcheck(product, (x,))
    assert torch.autograd.gradgradcheck(product, (x,))


def test_frozen_rotations_save_no_input() -> None:
    x, blocks = tensor(7, 6), tensor(3, 2, 2, trained=False)
    assert saved_bytes(lambda: RotatedBlocks()(x, blocks), (blocks,)) == 0
    assert torch.autograd.gradcheck(lambda x: RotatedBlocks()(x, blocks), (x,))
    pairs, straight, crossed = tensor(7, 3, 2, 4), tensor(3, 1, 4, trained=False), tensor(3, 2, 4, trained=False)
    assert saved_bytes(lambda: rotated_pairs_at_once(pairs, straight, crossed), (straight, crossed)) == 0
    assert torch.autograd.gradcheck(lambda pairs: rotated_pairs_at_once(pairs, straight, crossed), (pairs,))
