"""Check that a `ParamSpec` with an impossible value is an error when it is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lora_lite_fx as llfx

Spec: Any = llfx.ParamSpec
INITS = "'zeros', 'ones', 'kaiming'"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"shape": [2, 3]}, "shape must be a tuple of integers from 0, got [2, 3]."),
        ({"shape": 8}, "shape must be a tuple of integers from 0, got 8. Write (8,) for one dimension."),
        ({"shape": (2, -1)}, "shape must be a tuple of integers from 0, got (2, -1)."),
        ({"shape": (2, 3.0)}, "shape must be a tuple of integers from 0, got (2, 3.0)."),
        ({"shape": (True,)}, "shape must be a tuple of integers from 0, got (<bool>,)."),
        (
            {"init": "kaimin"},
            f"unknown init 'kaimin', did you mean 'kaiming'? It is one of {INITS}, a number, or a function that fills a"
            " tensor in place.",
        ),
        (
            {"init": "x"},
            f"unknown init 'x'. It is one of {INITS}, a number, or a function that fills a tensor in place.",
        ),
        (
            {"init": math.nan},
            f"init must be one of {INITS}, a finite number, or a function that fills a tensor in place, got nan.",
        ),
        (
            {"init": torch.ones(2)},
            f"init must be one of {INITS}, a finite number, or a function that fills a tensor in place, got a Tensor.",
        ),
        ({"trainable": 1}, "trainable must be True or False, got 1."),
        ({"dtype": "float32"}, "dtype must be None or a torch.dtype, got 'float32'."),
        ({"dtype": torch.int64}, "a tensor of torch.int64 cannot be trained: write trainable=False."),
    ],
)
def test_an_impossible_value_is_named(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(llfx.ConfigError) as caught:
        Spec(**{"shape": (2,), **arguments})
    assert str(caught.value) == f"ParamSpec: {expected}"


def test_possible_values() -> None:
    for init in ("zeros", "ones", "kaiming", 0.5, 2, torch.nn.init.normal_):
        tensor = Spec((3, 2), init).empty(torch.float32, torch.device("cpu"))
        Spec((3, 2), init).fill(tensor)
        assert torch.isfinite(tensor).all()
    assert Spec((4, 0)).empty(torch.float32, torch.device("cpu")).numel() == 0
    assert Spec((4,), trainable=False, dtype=torch.int64).empty(torch.float32, torch.device("cpu")).dtype is torch.int64
