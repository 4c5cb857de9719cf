"""Some of the cases of `trainers.py`: an adapted model trains as the eager wrapper does under the same trainer."""

from __future__ import annotations

import pytest

from tests.hugging_face.trainers import CASES, compare
from tests.support.selection import slow_unless


@pytest.mark.parametrize(
    "name",
    slow_unless(
        ("accelerate", "TRL SFT, fused loss").__contains__,
        [
            "Trainer, NEFTune",
            "Trainer, best model",
            "Trainer, fused loss, torch_compile",
            "accelerate",
            "TRL SFT, packed",
            "TRL SFT, fused loss",
            "TRL Reward",
        ],
    ),
)
def test_losses_and_adapters_equal_those_of_the_eager_wrapper(name: str) -> None:
    if name.startswith("TRL"):
        pytest.importorskip("trl")
    outcome = compare(CASES[name])
    assert outcome.loss <= CASES[name].tolerance
    assert outcome.adapters <= CASES[name].tolerance < outcome.moved / 100
