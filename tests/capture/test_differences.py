"""How large results are, by which their differences are measured."""

from __future__ import annotations

import math

import pytest
import torch

from lora_lite_fx.capture.differences import largest

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -3.0], 3.0), ([2.0, 0.0], 2.0), ([0.0, 0.0], 0.0), ([-0.5, 0.25], 0.5), ([], 0.0)],
)
def test_the_largest_value_is_found_in_every_type(values: list[float], expected: float, dtype: torch.dtype) -> None:
    exact = math.floor(expected) if dtype is torch.int64 else expected
    assert largest(torch.tensor(values, dtype=torch.float64).to(dtype)) == exact


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", [math.inf, -math.inf, math.nan, "least", "most"])
def test_infinities_and_what_masks_put_in_their_place_are_no_values(other: float | str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    hidden = {"least": info.min, "most": info.max}.get(str(other), other)
    assert largest(torch.tensor([-2.0, hidden, 1.0], dtype=dtype)) == 2.0
    assert largest(torch.tensor([hidden], dtype=dtype)) == 0.0
