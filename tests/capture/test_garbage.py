"""Garbage is collected after a capture, and as before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.enable() if was_on else gc.disable()


@pytest.mark.parametrize("is_on", [True, False])
def test_collection_is_as_it_was_after_a_capture_and_after_an_error(is_on: bool) -> None:
    gc.enable() if is_on else gc.disable()
    llfx.capture(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert gc.isenabled() is is_on
    with pytest.raises(llfx.CaptureError):
        llfx.capture(nn.Linear(4, 4), (torch.ones(2, 5),))
    assert gc.isenabled() is is_on
