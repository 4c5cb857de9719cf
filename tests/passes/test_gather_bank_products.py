"""`gather_bank_products`: the products of a bank at sites of one input become one operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.ops.low_rank_products import LowRankProducts
from lora_lite_fx.passes import OPTIMIZATIONS
from tests.adapters.test_switches import fill
from tests.support.conformance import close
from tests.support.low_rank_llama import EVERYWHERE, gathered, llama, tokens
from tests.support.programs import count
from tests.support.saved import saved_bytes

aten = torch.ops.aten


def banked(cfg: llfx.Variant) -> Any:
    gm = llfx.rewrite(llama()[1], llfx.Bank(cfg, slots=3)).train()
    fill(gm)
    return gm


def run(gm: Any, ids: Tensor) -> Tensor:
    logits: Tensor = gm(**tokens(len(ids), 5), adapter_ids=ids).logits
    return logits


def test_siblings_are_one_operation_and_nothing_else_is_left_of_the_bank() -> None:
    gm = banked(llfx.LoRA(r=2, alpha=3.0, **EVERYWHERE))
    program = llfx.program(gm, "training")
    calls = gathered(program)
    assert [call.target.ranks for call in calls] == [(2, 2, 2), (2,), (2, 2), (2,)] * 2
    assert all(call.target.alphas == (1.5,) * len(call.target.ranks) for call in calls)
    assert count(program, aten.bmm.default) == 0
    ids = torch.tensor([2, -1, 0, 2])
    plain = llfx.optimize(gm, OPTIMIZATIONS.without("gather_bank_products"))

    def step(graph: Any) -> list[Any]:
        for parameter in gm.parameters():
            parameter.grad = None
        y = run(graph, ids)
        y.square().sum().backward()
        return [y, *(parameter.grad for parameter in llfx.adapter_parameters(gm))]

    for one, other in zip(step(plain), step(gm), strict=True):
        close(one, other, 1e-10, "with and without the pass")


@pytest.mark.broad
def test_a_bank_of_a_bfloat16_model_has_factors_in_float32() -> None:
    gm = llfx.rewrite(llama(torch.bfloat16)[1], llfx.Bank(llfx.LoRA(r=2, alpha=3.0, **EVERYWHERE), slots=3)).train()
    fill(gm)
    assert {parameter.dtype for parameter in llfx.adapter_parameters(gm)} == {torch.float32}
    assert len(gathered(llfx.program(gm, "training"))) == 8
    plain = llfx.optimize(gm, OPTIMIZATIONS.without("gather_bank_products"))
    ids = torch.tensor([2, -1, 0, 2])
    # Gathered products of float32 add up in another order on some processors, so a sum may round to the next bfloat16.
    result = run(gm, ids)
    close(result, run(plain, ids), 0.02, "with and without the pass")
    assert (result - run(gm, torch.full_like(ids, -1))).abs().max() > 0.2, "what the adapters add is far more"


def test_gradients_of_gradients() -> None:
    def products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
        return LowRankProducts((2,), (1.5,))(x, a, weight, None, b, None)[1]

    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 2, 4), (3, 2, 4), (3, 5, 2))
    given = [torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(products, given)
    assert torch.autograd.gradgradcheck(products, given)


@pytest.mark.broad
def test_what_is_saved_does_not_grow_with_the_slots() -> None:
    def saved(slots: int) -> int:
        gm = llfx.rewrite(llama()[1], llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), slots=slots)).train()
        return saved_bytes(lambda: run(gm, torch.tensor([0, 1, 0, 1])), gm.parameters())

    assert saved(2) == saved(64)


@pytest.mark.broad
def test_other_forms_are_left_alone_with_the_reason() -> None:
    gm = banked(llfx.DoRA(r=2, **EVERYWHERE))
    _, reports = gm.program_graph("training")
    (report,) = (each for each in reports if each.name == "gather_bank_products")
    assert report.edits == 0
    assert {each.why for each in report.declined} == {
        "the adapter does more than add a branch to the output of its site"
    }
