"""Banks: calls and configs that are refused, and the slots that a message names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.adapters.test_bank import EVERYWHERE, banked, inputs, stack
from tests.adapters.test_switches import fill
from tests.support.conformance import small
from tests.support.models import ResidualMLP
from tests.support.selection import broad_after


def test_ids_that_numpy_changes_are_checked_again() -> None:
    _, graph = stack(ResidualMLP)
    gm: Any = llfx.rewrite(graph, llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), slots=2))
    ids, x = torch.tensor([0, 1]), inputs(2, 4)
    gm(x, adapter_ids=ids)
    ids.numpy()[0] = 7  # which the counter of writes does not see
    with pytest.raises(llfx.AdapterError, match="adapter_ids has 7"):
        gm(x, adapter_ids=ids)


def test_ids_are_checked_against_the_banks_that_act() -> None:
    _, graph = stack(ResidualMLP)
    cfg = llfx.LoRA(r=2, **EVERYWHERE)
    gm: Any = llfx.rewrite(graph, {"small": llfx.Bank(cfg, slots=2), "large": llfx.Bank(cfg, slots=4)})
    fill(gm)
    ids, x = torch.tensor([3, -1, 0]), inputs(3, 4)
    message = "adapter_ids has 3, and the bank has 2 slots"
    with pytest.raises(llfx.AdapterError, match=message):
        gm(x, adapter_ids=ids)
    with pytest.raises(llfx.AdapterError, match=message):
        llfx.by_row(gm, ids)
    with llfx.active(gm, "large"):
        y = gm(x, adapter_ids=ids)
        with llfx.by_row(gm, ids):
            assert torch.equal(gm(x), y)
            with llfx.active(gm, "small"), pytest.raises(llfx.AdapterError, match=message):
                gm(x)


MISTAKES: dict[str, tuple[Any, Any, str]] = {
    "": (lambda gm, x: gm(x), llfx.CallError, "adapter_ids is missing: the model has a bank"),
    "one id": (
        lambda gm, x: gm(x, adapter_ids=torch.tensor([0])),
        llfx.CallError,
        "There are 1 adapter_ids, one for each row of the batch, and 3 rows.",
    ),
    "too large": (
        lambda gm, x: gm(x, adapter_ids=torch.tensor([0, 3, 0])),
        llfx.AdapterError,
        "adapter_ids has 3, and the bank has 3 slots: 0 to 2, and -1 for the frozen model.",
    ),
    "too small": (lambda gm, x: gm(x, adapter_ids=torch.tensor([0, -2, 0])), llfx.AdapterError, "adapter_ids has -2"),
    "floats": (
        lambda gm, x: gm(x, adapter_ids=torch.tensor([0.0, 1.0, 2.0])),
        llfx.ConfigError,
        "adapter_ids is a tensor (batch,) of integers, the slot of each row, not a tensor (3,) of torch.float32.",
    ),
    "a list": (lambda gm, x: gm(x, adapter_ids=[0, 1, 2]), llfx.ConfigError, "the slot of each row, not [0, 1, 2]."),
    "merge": (
        lambda gm, x: llfx.merge(gm),
        llfx.AdapterError,
        "merge takes one adapter, and 'default' is a bank of 3.",
    ),
    "to_lora": (lambda gm, x: llfx.to_lora(gm), llfx.AdapterError, "A sum of adapters takes one adapter"),
    "swap": (lambda gm, x: llfx.swap(gm, llfx.take_slot(gm, 0)), llfx.ConfigError, "'default' is a bank."),
}


@pytest.mark.parametrize("name", broad_after(4, MISTAKES))
def test_mistakes_in_calls(name: str) -> None:
    call, error, message = MISTAKES[name]
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    with pytest.raises(error, match=re.escape(message)):
        call(gm, inputs(3, 4))


def test_configs_that_cannot_be_banks() -> None:
    model, graph = stack(ResidualMLP)
    for cfg, message in (
        (
            llfx.Bank(llfx.HRA(r=2, **EVERYWHERE), 2),
            "HRA cannot adapt .*, which has a bank of adapters: triu is not",
        ),
        (
            llfx.Bank(llfx.Full(target_names=("fc_in",)), 2),
            "calls base with a weight or bias, and a bank has one frozen weight",
        ),
        (llfx.Bank(small(llfx.VBLoRA, 2, **EVERYWHERE), 2), "VBLoRA cannot be a bank, because all its sites share"),
    ):
        with pytest.raises(llfx.ConfigError, match=message):
            llfx.rewrite(graph, cfg)
    with pytest.raises(
        llfx.AdapterError, match="The rows of the batch cannot be told in this graph, because it has no"
    ):
        llfx.rewrite(model, llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), 2))
    with pytest.raises(llfx.ConfigError, match="Bank takes the number of its adapters, slots=8, not 0"):
        llfx.Bank(llfx.LoRA(r=2), 0)
    with pytest.raises(
        llfx.ConfigError, match="slots is the number of adapters of a bank, a positive integer, got True"
    ):
        llfx.LoRA(r=2, slots=True)
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(llfx.ConfigError, match="is an embedding, and a bank has its adapters at plain linears"):
        llfx.rewrite(embedding, llfx.Bank(llfx.LoRA(r=2, target_kinds=("embedding",)), 2), (ids,))
    plain = llfx.rewrite(graph, llfx.LoRA(r=2, **EVERYWHERE))
    with pytest.raises(llfx.ConfigError, match="by_row takes a tensor of slots for a model with a bank"):
        llfx.by_row(plain, torch.tensor([0]))


def test_a_model_with_an_input_of_that_name_is_refused() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
            y: Tensor = self.lin(x) * adapter_ids[:, None, None]
            return y

    example = {"x": inputs(3, 4).float(), "adapter_ids": torch.ones(3)}
    with pytest.raises(llfx.ConfigError, match="The model has an input 'adapter_ids', and a bank needs that name"):
        llfx.rewrite(Takes(), llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), 2), example)
