"""Errors of targets that match nothing name a way out, and it works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.mistakes import anything


class Own(nn.Module):
    """Two linears whose roles nothing shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return y


def adapted(model: nn.Module, **fields: Any) -> list[str]:
    return [row.name for row in llfx.inspect(llfx.rewrite(model, llfx.LoRA(r=2, **fields))) if row.adapters]


def test_default_roles_that_no_site_has() -> None:
    with pytest.raises(llfx.SelectionError) as caught:
        llfx.rewrite(Own(), llfx.LoRA(r=2))
    way_out = "The way out: target_names=\".\" for all of them, or their names: target_names='fc1'."
    assert str(caught.value).endswith(f"(the first: fc1, fc2) with the roles: head. {way_out}")
    assert adapted(Own(), target_names=".") == ["fc1", "fc2"]
    assert adapted(Own(), target_names="fc1") == ["fc1"]


def test_given_roles_that_no_site_has_are_replaced_by_names() -> None:
    with pytest.raises(llfx.SelectionError, match=r'target_names="\." in place of target_roles for all of them'):
        llfx.rewrite(Own(), llfx.LoRA(r=2, target_roles="mlp"))


@pytest.mark.parametrize("fields", [{"layers": 7}, {"exclude_names": "."}, {"target_names": "fc3"}], ids=str)
def test_other_targets_that_match_nothing_have_no_way_out_that_fails(fields: dict[str, Any]) -> None:
    with pytest.raises(llfx.SelectionError) as caught:
        llfx.rewrite(Own(), llfx.LoRA(r=2, **fields))
    assert "The way out" not in str(caught.value)


def test_a_model_without_linears_names_the_kinds_that_it_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(llfx.SelectionError, match=r"no linear site to adapt.*target_kinds.*'conv' for 0 \(conv\)"):
        llfx.rewrite(model, llfx.LoRA(r=2))
    assert adapted(model, target_kinds="conv") == ["0"]


def test_a_name_in_the_place_of_a_role() -> None:
    with pytest.raises(llfx.ConfigError, match=r"unknown role 'q_proj'.*its name goes to.*: target_names='q_proj'"):
        anything.LoRA(target_roles="q_proj")


@pytest.mark.parametrize("field", ["target_roles", "target_names"])
def test_all_linear_is_a_word_of_peft(field: str) -> None:
    message = rf"{field}='all-linear' is PEFT's way.*target_roles=\(\"attention\", \"mlp\"\); or target_names=\"\.\""
    with pytest.raises(llfx.ConfigError, match=message):
        anything.LoRA(**{field: "all-linear"})
    with pytest.raises(llfx.ConfigError, match="all-linear"):
        anything.LoRA(**{field: ("query", "all-linear")})
