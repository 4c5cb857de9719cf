"""`hoist_parameter_work`: what depends on parameters alone stands before the inputs, where it is computed once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.passes import (
    HoistParameterWork,
)
from tests.support.conformance import randomise
from tests.support.programs import (
    after,
    count,
    derived,
    in_calls,
    reasons,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("cfg", "work"),
    [(llfx.FourierFT(n_frequency=30), aten.fft_ifft2.default), (llfx.HiRA(r=4), aten.matmul.default)],
)
def test_matrices_as_large_as_the_weight_are_not_kept(cfg: llfx.Variant, work: Any) -> None:
    cfg = dataclasses.replace(cfg, target_names=("0",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(64, 48)), cfg, (torch.ones(2, 64),))
    assert in_calls(derived(gm))[work] == in_calls(gm)[work] == 1


def test_norms_move_before_the_inputs() -> None:
    gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 5)), llfx.DoRA(r=2, target_names=(".",)), (torch.ones(2, 6),))
    randomise(gm, 1)
    hoisted, report = after(gm, HoistParameterWork())
    norm = aten.linalg_vector_norm.default
    assert (in_calls(gm)[norm], in_calls(hoisted)[norm], count(hoisted, norm)) == (1, 0, 1)
    assert report.edits > 1
    assert reasons(report) == []
    x = torch.ones(3, 6)
    assert torch.equal(hoisted(x), gm(x))


def test_the_reason_is_the_size_of_a_value() -> None:
    cfg = llfx.FourierFT(n_frequency=30, target_names=("0",))
    gm = llfx.rewrite(nn.Sequential(nn.Linear(64, 48)), cfg, (torch.ones(2, 64),))
    (reason,) = reasons(after(gm, HoistParameterWork())[1])
    assert reason == "0: a value (48, 64) is more than 4 times as large as the adapter's tensors"
