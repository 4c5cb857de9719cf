"""Roles are those of the base, whatever adapters compute around its linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from tests.support.conformance import small
from tests.support.models import tiny_llama
from tests.support.own_variants import Bottleneck, Gate, HeadRotation, registered
from tests.support.selection import broad_after

CONFIGS: dict[str, Any] = {
    "a rotation by head": HeadRotation(),
    "gates and bottlenecks": [Gate(), Bottleneck()],
    "a stack": [HeadRotation(), llfx.LoRA(r=2), llfx.HRA(r=2), HeadRotation(target_roles="attention")],
    "rotations of inputs": small(llfx.OFT),
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with registered(Bottleneck, Gate, HeadRotation):
        yield


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    return llfx.capture(LlamaForCausalLM(tiny_llama(num_hidden_layers=2)))


def _roles(gm: Any) -> dict[str, Any]:
    return {site.name: (site.roles, site.reasons) for site in find_sites(gm)}


@pytest.mark.parametrize("name", broad_after(1, CONFIGS))
def test_adapters_change_no_role_and_no_reason(name: str, base: Any) -> None:
    gm = llfx.rewrite(base, CONFIGS[name])
    graph = str(gm.graph)
    assert _roles(gm) == _roles(base)
    assert {row.name: row.roles for row in llfx.inspect(gm)} == {row.name: row.roles for row in llfx.inspect(base)}
    assert str(gm.graph) == graph, "looking changes nothing"


def test_a_later_rewrite_finds_the_roles_under_a_rotation(base: Any) -> None:
    rotated = llfx.rewrite(base, HeadRotation(target_roles=("query", "value")))
    gm = llfx.rewrite(rotated, llfx.LoRA(r=2, target_roles=("query", "key")))
    adapted = {row.name.rpartition(".")[2] for row in llfx.inspect(gm) if len(row.adapters) == 2}
    assert adapted == {"q_proj"}
    assert str(llfx.remove(gm).graph) == str(base.graph)
