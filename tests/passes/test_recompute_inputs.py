"""`recompute_inputs`: the backward pass computes the input of an adapter again, from values that the base saves."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.ops.dropped_product import DroppedProduct
from lora_lite_fx.passes import OPTIMIZATIONS, RecomputeInputs
from tests.passes.test_share_siblings import Overwrites
from tests.support.conformance import close, randomise
from tests.support.low_rank_llama import LOW_RANK, TRAINING, adapted_llama, gathered, llama, run, tokens
from tests.support.models import WIDTH
from tests.support.programs import (
    PLAIN,
    after,
    derived,
    reasons,
)
from tests.support.saved import saved_by
from tests.support.selection import broad_after

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("name", "most"), broad_after(1, [("LoRA", 1.05), ("DeLoRA", 1.05), ("HRA", 1.05), ("DoRA", 1.4)], several=True)
)
def test_hardly_more_is_saved_than_by_the_frozen_base(name: str, most: float) -> None:
    model = copy.deepcopy(llama(dtype=torch.float32)[0]).requires_grad_(False).train()
    model.enable_input_require_grads()
    gm = adapted_llama(name, dtype=torch.float32)
    plain = llfx.optimize(gm, PLAIN)
    assert all(run(case, 1, 2)().requires_grad for case in (model, gm, plain))
    of_base, ours, of_plain = (saved_by(case, tokens(64, 8)) for case in (model, gm, plain))
    assert of_base < ours <= most * of_base
    assert of_plain > 1.3 * ours


def test_products_get_a_recipe_and_the_first_one_says_why_it_has_none() -> None:
    gm = derived(adapted_llama("LoRA"), TRAINING.without("recompute_inputs"))
    assert [node.target.recipe is None for node in gathered(gm)] == 8 * [True]
    changed, report = after(gm, RecomputeInputs())
    assert report.edits == 7
    assert [node.target.recipe is None for node in gathered(changed)] == [True, *7 * [False]]
    (declined,) = report.declined
    assert declined.sites == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert declined.why == "the input depends on embedding, which is neither saved nor repeated"


def test_the_reason_is_a_write_or_dropout() -> None:
    everywhere: dict[str, Any] = {"target_names": (".",)}
    gm = llfx.rewrite(Overwrites(), llfx.LoRA(r=2, **everywhere), (torch.ones(2, WIDTH),))
    assert reasons(after(gm, RecomputeInputs())[1]) == [
        f"{name}: the graph overwrites tensors" for name in ("one", "two")
    ]
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 5))
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=("2",)), (torch.ones(2, 6),))
    expected = ["2: the input depends on dropout, which is neither saved nor repeated"]
    assert reasons(after(gm, RecomputeInputs())[1]) == expected


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "most"), broad_after(1, [("LoRA", 1.1), ("DeLoRA", 1.1), ("DoRA", 1.4)], several=True)
)
def test_dropout_takes_hardly_more_memory_and_gives_the_same_numbers(name: str, most: float) -> None:
    known: Any = LOW_RANK[name]
    cfg = dataclasses.replace(known, dropout=0.25)
    gm = llfx.rewrite(llama(dtype=torch.float32)[1], cfg).train()
    randomise(gm, 1)
    without = saved_by(adapted_llama(name, dtype=torch.float32), tokens(64, 8))
    assert saved_by(gm, tokens(64, 8)) <= most * without
    assert any(isinstance(node.target, DroppedProduct) for node in llfx.program(gm, "training").graph.nodes)
    plain = llfx.optimize(gm, OPTIMIZATIONS.without("recompute_inputs"))
    assert saved_by(plain, tokens(64, 8)) > 1.5 * without
    results = []
    for graph in (plain, gm):
        for parameter in gm.parameters():
            parameter.grad = None
        torch.manual_seed(3)
        logits = graph(**tokens(4, 8)).logits
        logits.square().sum().backward()
        results.append([logits, torch.rand(1), *(parameter.grad for parameter in llfx.adapter_parameters(gm))])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]), "as many random numbers were drawn"
    for one, other in zip(results[0][2:], results[1][2:], strict=True):
        close(one, other, 1e-5, "gradient")
    gm.eval()
    assert torch.equal(gm(**tokens(4, 8)).logits, llfx.optimize(gm, PLAIN).eval()(**tokens(4, 8)).logits)
