"""`group_heads`: grouped-query attention reads the heads of keys and values without copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lite_fx.passes import (
    GroupHeads,
)
from tests.support.low_rank_llama import TRAINING, adapted_llama
from tests.support.programs import (
    PLAIN,
    after,
    count,
    derived,
)

aten = torch.ops.aten


def test_heads_of_grouped_attention_are_not_repeated() -> None:
    gm = adapted_llama("LoRA")
    attention = derived(gm, TRAINING).graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert [node.kwargs["enable_gqa"] for node in attention] == [True, True]
    assert all(node.args[1].target is not aten.reshape.default for node in attention)
    (*_, node) = derived(gm, PLAIN).graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert node.args[1].target is aten.reshape.default


class Repeats(nn.Module):
    """Attention of four heads, whose keys and values are repeated from fewer."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (
            t[:, :, None].expand(2, heads, 4 // heads, 5, 3).reshape(2, 4, 5, 3)
            for t, heads in ((k, k.shape[1]), (v, v.shape[1]))
        )
        return F.scaled_dot_product_attention(q, k, v)


def test_the_reason_is_the_device_or_the_heads() -> None:
    q, k, v = (torch.randn(2, heads, 5, 3, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1))
    gm = torch.export.export(Repeats(), (q, k, v)).module()
    _, report = after(gm, GroupHeads())
    assert report.edits == 0
    assert [each.why for each in report.declined] == ["keys and values are repeated differently"]
    elsewhere, report = after(adapted_llama("LoRA").to("meta"), GroupHeads())
    assert report.edits == 0
    assert [str(each) for each in report.declined] == [f"model.layers.{i}.self_attn: not on the CPU" for i in range(2)]
    assert count(elsewhere, aten.expand.default) > 0
