"""`gather_products`: a product, its sites and their sums are one operation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import _REGISTRY
from lora_lite_fx.passes import FoldScaleIntoAddition, GatherProducts, Pipeline
from tests.support.conformance import randomise
from tests.support.low_rank_llama import TRAINING, adapted_llama, gathered, llama, run
from tests.support.programs import after, count, derived, reasons
from tests.support.selection import broad_after

aten = torch.ops.aten


@pytest.mark.parametrize("bias", broad_after(1, [False, True]))
@pytest.mark.parametrize("name", broad_after(2, ["LoRA", "DoRA", "DeLoRA"]))
def test_a_layer_has_four_gathered_products(name: str, bias: bool) -> None:
    gm = derived(adapted_llama(name, bias=bias), TRAINING)
    products = gathered(gm)
    assert [len(node.target.ranks) for node in products] == 2 * [3, 1, 2, 1]
    # Autograd saves nothing before the first adapter. All other inputs follow from tensors that the base saves.
    assert [node.target.recipe is not None for node in products] == [False, *7 * [True]]
    # DoRA scales the sum without the bias, so that a site with a bias is not scaled in the operation.
    scaled = [node.args[-1] is not None for node in products]
    assert set(scaled) == {name == "DoRA" and not bias}


@pytest.mark.broad
@pytest.mark.parametrize("dtype", broad_after(1, [torch.bfloat16, torch.float64]), ids=str)
def test_a_scaled_result_that_the_caller_could_overwrite_is_not_saved(dtype: torch.dtype) -> None:
    gm = llfx.rewrite(llama(dtype)[1], llfx.DoRA(r=2, target_names=("lm_head", "down_proj"))).train()
    randomise(gm, 1)
    products = [node for node in gathered(derived(gm, TRAINING)) if node.target.ranks]
    scaled = {str(node.args[-4]): node.args[-1] is not None for node in products}
    assert scaled.pop("lm_head_weight", None) is (False if dtype is torch.float64 else None)  # else it is not gathered
    assert list(scaled.values()) == [True, True]
    loss = run(gm, 2, 3)().div_(2.0).sum()
    loss.backward()


def test_three_products_and_a_sum_become_one_operation() -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.LoRA(r=2, target_names=(".",)), (torch.ones(2, 6),))
    randomise(gm, 1)
    fused, report = after(gm, GatherProducts())
    assert (report.edits, len(gathered(fused))) == (0, 0)
    assert reasons(report) == ["0: the branch goes into mul, not into a sum"]
    fused, report = after(derived(gm, Pipeline((FoldScaleIntoAddition(),))), GatherProducts())
    assert (report.edits, len(gathered(fused))) == (1, 1)
    assert (count(gm, aten.linear.default), count(fused, aten.linear.default)) == (3, 0)
    assert (count(gm, aten.add.Tensor), count(fused, aten.add.Tensor)) == (1, 0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused(x), gm(x))


class Bent(llfx.LoRA):
    """An adapter that is not linear."""

    def forward(self, x: Tensor, base: llfx.FrozenLinear, p: Any) -> Tensor:
        return base(x) + F.linear(torch.relu(F.linear(x, p.lora_A)), p.lora_B)


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (llfx.LoRA(r=2, dropout=0.5), "the branch reads another value than its site"),
        (llfx.HRA(r=2), "the branch goes into linear, not into a sum"),
        (llfx.PiSSA(r=2), "the branch goes into mul, not into a sum"),
        (Bent(r=2), "other operations stand between the products with A and B"),
    ],
    ids=["dropout", "input", "two branches", "between"],
)
def test_the_reason_is_the_form_of_the_branch(cfg: llfx.Variant, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, "Bent", Bent)
    cfg = dataclasses.replace(cfg, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), cfg, (torch.ones(2, 6),))
    _, report = after(derived(gm, TRAINING.without("gather_products", "recompute_inputs")), GatherProducts())
    assert (report.edits, reasons(report)) == (0, [f"0: {why}"])
