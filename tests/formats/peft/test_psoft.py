"""What of PEFT's PSOFT cannot be read or written, and what its files lack."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.peft_round_trip import EQUAL, round_trip
from tests.support.selection import broad_after

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()


def config(**fields: Any) -> peft.PsoftConfig:
    return peft.PsoftConfig(r=4, psoft_alpha=4, target_modules=["0", "2"], **fields)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "random factors": ({"psoft_svd": "lowrank"}, r"PSOFT with \{'psoft_svd': 'lowrank'"),
    "fewer terms": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, "'num_cayley_neumann_terms': 3"),
    "a bound of Q": ({"use_cayley_neumann": True, "cayley_neumann_eps": 0.9}, r"cayley_neumann_eps=0\.9 cannot"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_of_psoft_that_are_not_here_are_refused_by_name(what: str, tmp_path: Path) -> None:
    fields, part = REFUSED[what]
    model = peft.get_peft_model(copy.deepcopy(base()), config(**fields))
    with pytest.raises(llfx.ConfigError, match=part):
        llfx.from_peft_config(model.peft_config["default"])
    model.save_pretrained(str(tmp_path))
    with pytest.raises(llfx.CheckpointError, match=part):
        llfx.load_peft(base(), tmp_path)


def test_a_rank_above_a_side_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(llfx.ConfigError, match=r"r=6 is larger than site '2' allows .* use r <= 5"):
        llfx.rewrite(base(), llfx.PSOFT(r=6, target_names="."))


@pytest.mark.parametrize("alpha", broad_after(1, [4, 1, 12]))
def test_alpha_has_no_effect_in_peft_either(alpha: int) -> None:
    scaled = peft.PsoftConfig(r=4, psoft_alpha=alpha, target_modules=["0", "2"])
    assert round_trip(base(), scaled, X) == EQUAL


def test_factors_that_peft_would_not_compute_are_not_written(tmp_path: Path) -> None:
    gm = llfx.rewrite(base(), llfx.PSOFT(r=4, target_names="."))
    randomise(gm, 0)  # frozen tensors too
    with pytest.raises(llfx.ConfigError, match=r"frozen factors anew from the base\. At '0'"):
        llfx.save_peft(gm, tmp_path)
    assert not list(tmp_path.iterdir())
