"""`gather_products`: adapters in float32 on a base in bfloat16 are gathered in training, and not in inference."""

from __future__ import annotations

import pytest
import torch

import lora_lite_fx as llfx
from lora_lite_fx.passes import OPTIMIZATIONS, GatherProducts
from tests.support.low_rank_llama import TRAINING, adapted_llama, gathered, run, tokens
from tests.support.programs import PLAIN, after, derived
from tests.support.saved import saved_by
from tests.support.selection import broad_after


@pytest.mark.parametrize("name", broad_after(1, ["LoRA", "DoRA", "DeLoRA"]))
def test_adapters_of_a_bfloat16_model_are_gathered_in_float32(name: str) -> None:
    gm = adapted_llama(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in llfx.adapter_parameters(gm)} == {torch.float32}
    products = gathered(derived(gm, TRAINING))
    assert [len(node.target.ranks) for node in products] == 2 * [3, 1, 2, 1]
    assert {node.args[-1] is not None for node in products} == {name == "DoRA"}
    plain = llfx.optimize(gm, PLAIN)
    assert torch.equal(run(gm, 3, 4)(), run(plain, 3, 4)())
    singly, ours = (saved_by(each, tokens(2, 64)) for each in (plain, gm))
    assert ours < 0.5 * singly


@pytest.mark.broad
def test_the_scale_of_a_float16_model_stays_outside() -> None:
    """Check that nothing divides a result of float16 by a scale that may be tiny."""
    gm = derived(adapted_llama("DoRA", dtype=torch.float16), TRAINING.without("gather_products", "recompute_inputs"))
    _, report = after(gm, GatherProducts())
    assert report.edits == 0
    assert {declined.why for declined in report.declined} == {"the sum has another type than the output of the site"}


def test_inference_has_the_plain_operators() -> None:
    gm = derived(adapted_llama("LoRA", dtype=torch.bfloat16), OPTIMIZATIONS.of("inference"))
    assert gathered(gm) == []
