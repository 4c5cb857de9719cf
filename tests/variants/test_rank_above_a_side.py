"""A rank above a side of the weight, as at a classifier's head: what PEFT does, and no error for the whole model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import fx, nn

import lora_lite_fx as llfx
from tests.support.peft_round_trip import EQUAL, round_trip
from tests.support.selection import broad_after

SIDES = (8, 12, 2)  # a head of two classes
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2)).eval()


def trained(model: nn.Module) -> nn.Module:
    """Return the model with other values than those of the start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


EVERY: dict[str, Any] = {"target_names": (".",)}
VARIANTS = [
    llfx.LoRA(r=16, **EVERY),
    llfx.DoRA(r=16, **EVERY),
    llfx.PiSSA(r=16, **EVERY),
    llfx.OLoRA(r=16, **EVERY),
    llfx.DeLoRA(r=16, **EVERY),
    llfx.HRA(r=16, **EVERY),
    llfx.LoHa(r=16, **EVERY),
    llfx.HiRA(r=16, **EVERY),
    llfx.GraLoRA(r=16, **EVERY),
    llfx.AntiPaSTO(r=16, block_size=2, **EVERY),
]


@pytest.mark.parametrize("variant", broad_after(3, VARIANTS), ids=lambda variant: type(variant).__name__)
def test_every_site_is_adapted_and_equals_the_wrapper(variant: llfx.Variant) -> None:
    model = classifier()
    gm: fx.GraphModule = llfx.rewrite(model, variant, (X,)).eval()
    if not isinstance(variant, llfx.AntiPaSTO):  # which starts near the identity
        assert torch.allclose(gm(X), model(X), atol=1e-5)
    assert [row.name for row in llfx.inspect(gm) if row.adapters] == ["0", "2"]
    trained(gm)
    eager = llfx.wrap(model, variant).eval()
    llfx.load_adapter_state_dict(eager, llfx.adapter_state_dict(gm))
    assert not torch.allclose(gm(X), model(X), atol=1e-2)
    assert torch.allclose(gm(X), eager(X), atol=1e-5)
    assert torch.allclose(llfx.merge(gm)(X), eager(X), atol=1e-4)


def test_a_weight_has_no_more_parts_than_its_smaller_side() -> None:
    gm = llfx.rewrite(classifier(), llfx.PiSSA(r=8, alpha=4, **EVERY), (X,))
    shapes = {name: tuple(tensor.shape) for name, tensor in llfx.adapter_state_dict(gm).items()}
    assert shapes["0.lora_A"] == (8, 8)
    assert shapes["2.lora_A"] == (2, 12)
    assert shapes["2.lora_B"] == (2, 2)


THEIRS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=16, target_modules=["0", "2"]),
    "DoRA": peft.LoraConfig(r=16, use_dora=True, target_modules=["0", "2"]),
    "PiSSA": peft.LoraConfig(r=16, init_lora_weights="pissa", target_modules=["0", "2"]),
    "OLoRA": peft.LoraConfig(r=16, init_lora_weights="olora", target_modules=["0", "2"]),
    "LoHa": peft.LoHaConfig(r=16, target_modules=["0", "2"]),
    "HiRA": peft.HiraConfig(r=16, target_modules=["0", "2"]),
    "HRA": peft.HRAConfig(r=16, target_modules=["0", "2"]),
    "DeLoRA": peft.DeloraConfig(r=16, target_modules=["0", "2"]),
    "GraLoRA": peft.GraloraConfig(r=16, target_modules=["0", "2"]),
}


@pytest.mark.parametrize("method", broad_after(2, THEIRS))
def test_files_of_peft_with_such_a_rank_load_and_are_written(method: str) -> None:
    assert round_trip(classifier(), THEIRS[method], X) == EQUAL
