"""Patterns of targets and exclusions that match no site are named in a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.selection import broad_after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y: Tensor = self.q_proj(x) * self.v_proj(x)
        return y


IDS = (torch.tensor([[1, 2]]),)


@pytest.mark.parametrize(
    ("cfg", "parts"),
    [
        (llfx.LoRA(r=2, target_names=("q_proj", "c_attn")), ["'c_attn' in target_names"]),
        (llfx.LoRA(r=2, target_names=("q_proj", "vproj")), ["'vproj' in target_names (the nearest: v_proj)"]),
        (llfx.LoRA(r=2, target_names="q_proj", exclude_names="lm_head"), ["'lm_head' in exclude_names"]),
        (
            llfx.IA3(target_names=("a", "q_proj", "b1"), exclude_names=("v_proj", "b2")),
            ["'b1' in target_names", "'b2' in exclude_names"],
        ),
        (
            llfx.LoRA(r=2, target_names=("q_proj", "embed")),
            ["'embed' in target_names (to adapt embed (embedding), name its kind in target_kinds)"],
        ),
    ],
)
@pytest.mark.parametrize("how", broad_after(1, [llfx.rewrite, llfx.wrap]))
def test_each_pattern_that_matches_nothing_is_named_once(how: object, cfg: llfx.Variant, parts: list[str]) -> None:
    assert callable(how)
    with pytest.warns(UserWarning, match="no linear site of the model matches") as caught:
        how(Net(), cfg, IDS)
    (warning,) = caught
    assert warning.filename == __file__
    named = str(warning.message).partition("matches ")[2].rstrip(".").split(", nor ")
    assert [part for part in named if "'a' in" not in part] == parts


@pytest.mark.parametrize(
    "cfg",
    [
        llfx.LoRA(r=2, target_names=("q_proj", "v_proj"), exclude_names="v_proj"),
        llfx.LoRA(r=2, target_names=("q_proj", "embed"), target_kinds=("linear", "embedding")),
        llfx.LoRA(r=2, target_names="(?i)Q_PROJ"),
    ],
)
def test_patterns_that_match_are_not(cfg: llfx.Variant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llfx.rewrite(Net(), cfg, IDS)


def test_a_peft_config_with_layers_has_one_pattern_for_each_target() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}
    cfg = llfx.from_peft_config(config)
    assert isinstance(cfg, llfx.Variant)
    assert len(cfg.target_names or ()) == 2


def test_a_file_is_loaded_without_a_word(tmp_path: object) -> None:
    path = f"{tmp_path}/adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llfx.save(llfx.rewrite(Net(), llfx.LoRA(r=2, target_names=("q_proj", "c_attn")), IDS), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llfx.load(Net(), path, IDS)
