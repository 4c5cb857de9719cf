"""A graph follows its tensors to another device, and the error of a call names an input on another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.errors import CallError
from tests.support.models import tiny_llama

META = torch.device("meta")


class Counts(nn.Module):
    """Makes a tensor on the device of its input, and computes it without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            places = torch.arange(4.0, device=x.device)
        y: Tensor = self.linear(x + places)
        return y


def rewritten() -> Any:
    return llfx.rewrite(Counts(), llfx.LoRA(r=2, target_names="linear"), (torch.randn(2, 4),))


def test_what_a_graph_makes_is_made_on_the_new_device() -> None:
    gm = rewritten()
    expected = gm(torch.ones(2, 4))
    gm.to(META)
    assert "cpu" not in gm.code
    values = [node.meta["val"] for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert {value.device for value in values} == {META}
    gm.to_empty(device="cpu")
    assert gm(torch.ones(2, 4)).device == expected.device
    assert "meta" not in gm.code


@pytest.mark.broad
def test_an_argument_that_is_left_out_is_made_on_the_new_device() -> None:
    ids = torch.randint(0, 8, (2, 5))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gm: Any = llfx.rewrite(LlamaForCausalLM(tiny_llama()).eval(), llfx.LoRA(r=2), example)
    gm.to(META)
    graph, _ = gm.program_graph("training", ("attention_mask",))
    assert "cpu" not in graph.code
    gm.to_empty(device="cpu")
    assert gm(input_ids=ids).logits.device == ids.device


def test_an_input_on_another_device_is_named() -> None:
    gm = rewritten().to(META)
    with pytest.raises(
        CallError,
        match=r'^x is on cpu in this call, and the graph is on meta\. The way out: model\.to\("cpu"\), or'
        r' x\.to\("meta"\)\.$',
    ):
        gm(torch.ones(2, 4))
