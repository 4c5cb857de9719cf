"""A step reads no value of a tensor: on a GPU the process would wait, and a CUDA graph could not be recorded.

The steps run on the CPU, on the way that they take on a device: `reading_waits` says that a read waits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.errors import AdapterError
from lora_lite_fx.execution import bank_inputs
from lora_lite_fx.ops import attention_mask, chunked_loss
from tests.devices.fake_cuda import FROM_DATA, captured, config, tokens
from tests.devices.host_reads import host_reads
from tests.support.releases import since
from tests.support.selection import broad_after, by_tier, slow_after

VARIANTS = [name for name in llfx.registry() if name not in FROM_DATA]


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_mask, bank_inputs, chunked_loss):
        monkeypatch.setattr(module, "reading_waits", lambda tensor: True)


def without_mask() -> dict[str, Tensor]:
    inputs = tokens()
    del inputs["attention_mask"]
    return inputs


def train(gm: Any, inputs: dict[str, Tensor]) -> None:
    gm.train()(**inputs).loss.backward()


@pytest.mark.parametrize(
    "options", broad_after(1, slow_after(1, [{"fuse_loss": True}, {}, {"checkpoint_layers": True}])), ids=str
)
@pytest.mark.parametrize("name", broad_after(1, by_tier(VARIANTS)))
def test_a_step_of_training_reads_nothing(name: str, options: dict[str, Any]) -> None:
    gm = llfx.rewrite(captured(torch.float32, **options)[0], config(name))
    train(gm, without_mask())  # the first call derives the program, and looks at the mask of this length
    with host_reads() as reads:
        train(gm, without_mask())
    assert reads == []


@pytest.mark.parametrize("name", broad_after(1, by_tier(VARIANTS)))
def test_a_call_in_frozen_reads_nothing(name: str) -> None:
    gm = llfx.rewrite(captured(torch.float32)[0], config(name)).eval()
    with torch.no_grad(), llfx.frozen(gm):
        gm(**without_mask())
        with host_reads() as reads:
            gm(**without_mask())
    assert reads == []


def test_a_bank_reads_nothing_where_the_scope_says_the_rows() -> None:
    gm = llfx.rewrite(captured(torch.float32)[0], llfx.Bank(config("LoRA"), slots=3)).eval()
    ids = torch.zeros(2, dtype=torch.long)
    with torch.no_grad(), llfx.by_row(gm, ids), llfx.frozen(gm):
        gm(**without_mask())
        with host_reads() as reads:
            gm(**without_mask())
        assert reads == []
        ids.fill_(3)
        with pytest.raises(AdapterError, match="adapter_ids has 3, and the bank has 3 slots"):
            gm(**without_mask())
    gm(**without_mask(), adapter_ids=torch.zeros_like(ids))
    with host_reads() as reads:
        gm(**without_mask(), adapter_ids=torch.ones_like(ids))
    assert reads == ["check_slots"]


@since("transformers", "5.24", "No region without gradients stands between the mask and the layers")
def test_an_attention_mask_is_looked_at_once() -> None:
    gm = llfx.rewrite(captured(torch.float32)[0], config("LoRA"))
    train(gm, tokens())
    with host_reads() as reads:
        train(gm, tokens())
    assert reads == ["needed_mask"]
    never = llfx.optimize(gm, llfx.passes.OPTIMIZATIONS.without("leave_out_mask"))
    train(never, tokens())
    with host_reads() as reads:
        train(never, tokens())
    assert reads == []


def test_reads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(3.0)
    with host_reads() as reads:
        values.tolist()
        values[values > 1]
        assert bool(values.sum() > 0)
        torch.equal(values, values)
    assert reads == ["test_reads_are_noticed"] * 4
    gm = llfx.rewrite(captured(torch.float32, fuse_loss=True)[0], config("LoRA"))
    train(gm, without_mask())
    monkeypatch.setattr(chunked_loss, "reading_waits", lambda tensor: False)
    with host_reads() as reads:
        train(gm, without_mask())
    assert reads == ["compute"]
