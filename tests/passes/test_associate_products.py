"""`associate_products`: the small matrices of an adapter are multiplied first, where that leaves less to do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.graph.insertion import is_inserted
from lora_lite_fx.ops.attention_mask import MaskOfSizes
from lora_lite_fx.ops.low_rank_products import LowRankProducts
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    AssociateProducts,
)
from tests.passes.test_pipeline import EXAMPLE, Down
from tests.support.conformance import randomise
from tests.support.low_rank_llama import LOW_RANK, adapted_llama, gathered
from tests.support.programs import (
    after,
    derived,
    in_calls,
    reasons,
)

T, IN, OUT, R, BLOCK = 256, 192, 160, 8, 8

aten = torch.ops.aten


def test_shared_bases_are_not_multiplied_into_a_matrix_for_each_site() -> None:
    cfg = llfx.RandLoRA(r=R, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),)).eval()
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 0
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), llfx.LoRA(r=128, target_names=(".",)), (torch.randn(3, IN),))
    assert {report.name: report.edits for report in OPTIMIZATIONS.run(gm)}["associate_products"] == 1


def test_two_products_become_one_with_a_matrix_of_parameters() -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.LoRA(r=4, target_names=(".",)), (torch.ones(2, 6),))
    randomise(gm, 1)
    associated, report = after(gm, AssociateProducts())
    assert (report.edits, reasons(report)) == (1, [])
    assert (in_calls(gm)[aten.linear.default], in_calls(associated)[aten.linear.default]) == (2, 1)
    assert (in_calls(gm)[aten.matmul.default], in_calls(associated)[aten.matmul.default]) == (0, 1)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(associated(x), gm(x))


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (llfx.LoRA(r=2), "two narrow products take less than one"),
        (llfx.RandLoRA(r=R), "all sites share a matrix"),
    ],
    ids=["narrow", "shared"],
)
def test_the_reason_is_the_cost(cfg: llfx.Variant, why: str) -> None:
    cfg = dataclasses.replace(cfg, target_names=(".",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(IN, OUT)), cfg, (torch.randn(3, IN),))
    _, report = after(gm, AssociateProducts())
    assert report.edits == 0
    assert {each.why for each in report.declined} == {why}


# Branches at the input of a site.


@pytest.mark.broad
def test_in_inference_all_low_rank_variants_run_the_same_operations() -> None:
    counts = {}
    for name in LOW_RANK:
        gm = derived(adapted_llama(name), OPTIMIZATIONS.of("inference"))
        nodes = list(gm.graph.nodes)
        first = next(index for index, node in enumerate(nodes) if node.op == "placeholder")
        assert not gathered(gm)
        targets = (
            type(n.target) if isinstance(n.target, (LowRankProducts, MaskOfSizes)) else n.target for n in nodes[first:]
        )
        counts[name] = Counter(target for target in targets if target is not aten.type_as.default)
    assert counts["LoRA"] == counts["DeLoRA"] == counts["HRA"]
    row_scales = counts["DoRA"] - counts["LoRA"]
    assert row_scales == {aten.mul.Tensor: 14}  # one for each site


GATE = llfx.IA3(target_names=("proj",))
HALF = llfx.HRA(r=2, dtype=torch.bfloat16)


def reflected(cfg: llfx.Variant, dtype: torch.dtype = torch.float32, d_out: int = 5) -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(6, d_out)).to(dtype)
    gm = llfx.rewrite(model, dataclasses.replace(cfg, target_names=(".",)), (torch.ones(2, 6, dtype=dtype),))
    randomise(gm, 1)
    return gm


def adapted_inputs(gm: fx.GraphModule) -> list[bool]:
    """Return for each site whether an adapter changes its input."""
    linears: list[Any] = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    return [is_inserted(node.args[0]) for node in linears if not is_inserted(node)]


def test_the_sum_moves_behind_the_site() -> None:
    gm = reflected(llfx.HRA(r=2))
    moved, report = after(gm, AssociateProducts())
    assert [why for why in reasons(report) if "narrow" not in why] == []
    assert (adapted_inputs(gm), adapted_inputs(moved)) == ([True], [False])
    assert (in_calls(gm)[aten.type_as.default], in_calls(moved)[aten.type_as.default]) == (0, 0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved(x), gm(x))


@pytest.mark.parametrize(
    ("gm", "why"),
    [
        (lambda: reflected(llfx.OFT(block_size=2)), "the adapter adds no low-rank branch to the input"),
        (lambda: llfx.rewrite(Down(), GATE, EXAMPLE), "the adapter does not add to the input"),
        (lambda: reflected(llfx.HRA(r=2), torch.bfloat16), "the weight and B have different types"),
        (
            lambda: reflected(llfx.HRA(r=2, dtype=torch.bfloat16), torch.bfloat16),
            "in half precision W B would be rounded",
        ),
        (lambda: reflected(llfx.HRA(r=2), d_out=25), "the output is more than 4 times as wide as the input"),
    ],
    ids=["no branch", "no sum", "types", "half", "wide"],
)
def test_the_reason_is_given_for_each_site(gm: Callable[[], fx.GraphModule], why: str) -> None:
    before = gm()
    moved, report = after(before, AssociateProducts())
    assert adapted_inputs(before) == adapted_inputs(moved)
    assert [each.why for each in report.declined if "two narrow products" not in each.why] == [why]
