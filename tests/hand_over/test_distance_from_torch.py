"""How far results are from those of torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lora_lite_fx.hand_over.distance_from_torch import allowed, difference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("results", "expected", "apart"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        ([torch.ones(2), torch.tensor([3.0])], (torch.ones(2), torch.tensor([2.0])), 0.5),
        (torch.tensor([1e-6]), torch.tensor([2e-6]), 1e-3),  # of 0.001, because noise is all that there is
        (torch.tensor([NAN, -INF, 1.0]), torch.tensor([NAN, -INF, 1.0]), 0.0),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0]), INF),
        (torch.tensor([1.0, 1.0]), torch.tensor([NAN, 1.0]), INF),
        (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), INF),
        (torch.ones(2), torch.ones(1, 2), INF),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], INF),
        (torch.ones(0), torch.ones(0), 0.0),
        (torch.tensor([3]), torch.tensor([2]), 0.5),
    ],
)
def test_differences(results: Any, expected: Any, apart: float) -> None:
    assert math.isclose(difference(results, expected), apart, rel_tol=1e-6)


def test_half_precision_may_be_further_away() -> None:
    single = torch.ones(1)
    assert allowed(single) < allowed([single, single.half()]) < allowed([single, single.bfloat16()])
