"""`convert_mask_once`: the mask of attention is converted once, and not in each layer."""

from __future__ import annotations

import torch

import lora_lite_fx as llfx
from lora_lite_fx.ops.attention_mask import as_numbers
from lora_lite_fx.passes import (
    OPTIMIZATIONS,
    ConvertMaskOnce,
)
from tests.support.conformance import randomise
from tests.support.low_rank_llama import LOW_RANK, adapted_llama, llama, tokens
from tests.support.programs import (
    PLAIN,
    after,
    count,
    derived,
    reasons,
)
from tests.support.releases import since

aten = torch.ops.aten


@since("transformers", "5.24", "No region without gradients stands between the mask and the layers")
def test_a_mask_is_converted_once_for_all_layers() -> None:
    inputs = {**tokens(3, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])}
    gm = llfx.rewrite(llama()[0], LOW_RANK["LoRA"], inputs)
    randomise(gm, 1)
    for program in ("training", "inference"):
        graph = derived(gm, OPTIMIZATIONS.of(program)).graph
        assert len(graph.find_nodes(op="call_function", target=as_numbers)) == 1
        attention = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        assert [node.args[3].target for node in attention] == [as_numbers] * len(attention)
    for keep in (torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with keep:
            assert torch.equal(
                gm(**inputs).logits, llfx.optimize(gm, OPTIMIZATIONS.without("convert_mask_once"))(**inputs).logits
            )


@since("transformers", "5.24", "No region without gradients stands between the mask and the layers")
def test_the_reason_is_the_device_or_a_single_reader() -> None:
    gm = adapted_llama("LoRA")
    attentions = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    converted, report = after(gm, ConvertMaskOnce())
    assert (report.edits, reasons(report)) == (1, [])
    assert (count(gm, as_numbers), count(converted, as_numbers)) == (0, 1)
    alone = derived(gm, PLAIN)
    (_, second) = alone.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    second.kwargs = {key: value for key, value in second.kwargs.items() if key != "attn_mask"}
    second.args = second.args[:3]
    for changed, why in (
        (alone, "no other attention reads the mask"),
        (derived(gm, PLAIN).to("meta"), "not on the CPU"),
    ):
        _, report = after(changed, ConvertMaskOnce())
        assert report.edits == 0
        assert [each.why for each in report.declined] == [why]
    assert len(attentions) == 2
