"""Slots of a bank: taken out, put in, started anew, saved and loaded as single adapters are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite_fx as llfx
from tests.adapters.test_bank import EVERYWHERE, banked, inputs, stack
from tests.adapters.test_switches import fill
from tests.support.conformance import close
from tests.support.models import ResidualMLP
from tests.support.selection import broad_after


def of_slot(gm: Any, slot: int) -> Any:
    """Return what a bank computes with one slot in all rows."""
    return gm(inputs(3, 4), adapter_ids=torch.full((3,), slot))


def values(gm: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(gm).items()}


@pytest.mark.parametrize(
    "cfg", broad_after(1, [llfx.LoRA(r=2, alpha=3.0, **EVERYWHERE), llfx.DoRA(r=2, **EVERYWHERE)]), ids=["LoRA", "DoRA"]
)
def test_a_slot_goes_to_a_file_and_back_to_the_bit(cfg: llfx.Variant, tmp_path: Path) -> None:
    gm, model = banked(cfg)
    before, expected = values(gm), of_slot(gm, 1)
    llfx.save_slot(gm, 1, tmp_path / "one.safetensors")
    alone = llfx.load(model, tmp_path / "one.safetensors", (inputs(3, 4),))
    close(alone(inputs(3, 4)), expected, 1e-12, "the file as a single adapter")
    llfx.load_slot(gm, 2, tmp_path / "one.safetensors")
    for name, value in values(gm).items():
        assert torch.equal(value[2], before[name][1])
        assert torch.equal(value[:2], before[name][:2])
    llfx.save_peft(llfx.take_slot(gm, 0), tmp_path / "peft")
    llfx.load_slot(gm, 1, tmp_path / "peft")
    close(of_slot(gm, 1), of_slot(gm, 0), 1e-6, "through PEFT's format, which is float32")
    llfx.save(gm, tmp_path / "bank.safetensors")
    again = llfx.load(model, tmp_path / "bank.safetensors", (inputs(3, 4),))
    assert torch.equal(of_slot(again, 2), of_slot(gm, 2))
    assert "slots" not in llfx.adapters(alone)[0].fields


@pytest.mark.broad
def test_a_bank_of_lora_takes_what_has_a_smaller_rank_at_fewer_sites(tmp_path: Path) -> None:
    gm, _ = banked(llfx.LoRA(r=4, alpha=3.0, **EVERYWHERE))
    _, graph = stack(ResidualMLP)
    for cfg in (
        llfx.LoRA(r=2, target_names=("fc_in",)),
        llfx.LoRA(r=4, alpha=1.0, **EVERYWHERE),
        llfx.PiSSA(r=1, **EVERYWHERE),
    ):
        source: Any = llfx.rewrite(graph, cfg)
        fill(source, seed=3)
        llfx.put_slot(gm, 1, source)
        close(of_slot(gm, 1), source(inputs(3, 4)), 1e-9, type(cfg).__name__)
    before = values(gm)
    with pytest.raises(llfx.ConfigError, match=r"has the rank 6 at .*, and 'default' has room for 4"):
        llfx.put_slot(gm, 1, llfx.rewrite(graph, llfx.LoRA(r=6, **EVERYWHERE)))
    for name, value in values(gm).items():
        assert torch.equal(value, before[name])


@pytest.mark.broad
def test_a_bank_of_another_variant_takes_its_own_config_alone() -> None:
    gm, _ = banked(llfx.IA3(**EVERYWHERE))
    _, graph = stack(ResidualMLP)
    source: Any = llfx.rewrite(graph, llfx.IA3(**EVERYWHERE))
    fill(source, seed=3)
    llfx.put_slot(gm, 0, source)
    assert torch.equal(of_slot(gm, 0), source(inputs(3, 4)))
    for other in (llfx.LoRA(r=2, **EVERYWHERE), llfx.IA3(target_names=("fc_in",))):
        with pytest.raises(llfx.ConfigError, match="The way out: an adapter of the bank's config, or a bank of LoRA"):
            llfx.put_slot(gm, 0, llfx.rewrite(graph, other))


@pytest.mark.broad
def test_a_slot_starts_anew_and_the_others_stay() -> None:
    for cfg in (llfx.LoRA(r=2, **EVERYWHERE), llfx.DoRA(r=2, **EVERYWHERE)):
        gm, model = banked(cfg)
        before = values(gm)
        llfx.reset_slot(gm, 1)
        close(of_slot(gm, 1), model(inputs(3, 4)), 1e-9, "the start")
        drawn = {name: value[1].clone() for name, value in values(gm).items()}
        llfx.reset_slot(gm, 1)
        assert not torch.equal(drawn["0.fc_in.lora_A"], llfx.adapter_state_dict(gm)["0.fc_in.lora_A"][1])
        for name, value in values(gm).items():
            assert torch.equal(value[[0, 2]], before[name][[0, 2]])


def test_slots_start_as_single_adapters_do_and_each_by_itself() -> None:
    _, graph = stack(ResidualMLP)
    bank = llfx.adapter_state_dict(llfx.rewrite(graph, llfx.Bank(llfx.PiSSA(r=2, **EVERYWHERE), 2)))
    one = llfx.adapter_state_dict(llfx.rewrite(graph, llfx.PiSSA(r=2, **EVERYWHERE)))
    for name, value in one.items():
        for slot in range(2):
            close(bank[name][slot], value, 1e-9, name)
    drawn = llfx.adapter_state_dict(llfx.rewrite(graph, llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), 2)))
    assert not torch.equal(drawn["0.fc_in.lora_A"][0], drawn["0.fc_in.lora_A"][1])


@pytest.mark.broad
def test_slots_of_a_named_bank_beside_another() -> None:
    _, graph = stack(ResidualMLP)
    banks = {"small": llfx.Bank(llfx.LoRA(r=1, **EVERYWHERE), 2), "large": llfx.Bank(llfx.LoRA(r=3, **EVERYWHERE), 4)}
    gm: Any = llfx.rewrite(graph, banks)
    fill(gm)
    with pytest.raises(
        llfx.ConfigError, match=re.escape("The model has the banks small, large. The way out: adapter=")
    ):
        llfx.take_slot(gm, 0)
    with llfx.active(gm, "large"):
        close(of_slot(gm, 3), llfx.take_slot(gm, 3, adapter="large")(inputs(3, 4)), 1e-12, "the large bank")
    with pytest.raises(llfx.AdapterError, match="adapter_ids has 3, and the bank has 2 slots"):
        of_slot(gm, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    broad_after(
        2,
        [
            (lambda gm, plain: llfx.take_slot(gm, 3), "3 is not a slot of 'default', which has 3: 0 to 2."),
            (lambda gm, plain: llfx.reset_slot(gm, -1), "-1 is not a slot of 'default'"),
            (lambda gm, plain: llfx.take_slot(gm, True), "True is not a slot of 'default'"),
            (lambda gm, plain: llfx.take_slot(plain, 0), "'default' is not a bank; the model has default."),
            (lambda gm, plain: llfx.take_slot(gm, 0, adapter="fr"), "The model has no adapter 'fr'"),
        ],
        several=True,
    ),
)
def test_mistakes(call: Any, message: str) -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    plain = llfx.rewrite(stack(ResidualMLP)[1], llfx.LoRA(r=2, **EVERYWHERE))
    with pytest.raises(llfx.ConfigError, match=re.escape(message)):
        call(gm, plain)
