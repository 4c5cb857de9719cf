"""`SlotOptimizer`: many adapters trained in one step are what each is when it is trained alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.adapters.test_bank import EVERYWHERE, SLOTS, banked, inputs
from tests.support.conformance import close
from tests.support.selection import broad_after

BATCHES = ([0, 2, 2, -1, 0, 2], [1, 1, 0, 0, -1, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2])

MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


def loss_of_rows(y: Tensor, seed: int) -> Tensor:
    target = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(100 + seed))
    return (y - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("name", broad_after(1, MAKERS))
def test_slots_train_as_each_alone(name: str) -> None:
    cfg = llfx.DoRA(r=2, **EVERYWHERE) if name == "SGD" else llfx.LoRA(r=2, **EVERYWHERE)
    gm, _ = banked(cfg)
    alone: list[Any] = [llfx.take_slot(gm, slot) for slot in range(SLOTS)]
    optimizer = llfx.SlotOptimizer(gm, MAKERS[name], max_norm=0.5)
    optimizers = [MAKERS[name](list(llfx.adapter_parameters(each))) for each in alone]
    optimizer.slots[1].param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = 0.03
    for step, slots in enumerate(BATCHES):
        ids, x = torch.tensor(slots), inputs(6, 4, seed=step)
        losses = loss_of_rows(gm(x, adapter_ids=ids), step)
        used = sorted({slot for slot in slots if slot >= 0})
        torch.stack([losses[ids == slot].mean() for slot in used]).sum().backward()
        optimizer.step(ids)
        optimizer.zero_grad()
        for slot in used:
            rows = ids == slot
            loss_of_rows_of_all = loss_of_rows(alone[slot](x), step)
            loss_of_rows_of_all[rows].mean().backward()
            nn.utils.clip_grad_norm_(llfx.adapter_parameters(alone[slot]), 0.5)
            optimizers[slot].step()
            optimizers[slot].zero_grad()
    of_bank = llfx.adapter_state_dict(gm)
    for slot, each in enumerate(alone):
        for path, value in llfx.adapter_state_dict(each).items():
            close(of_bank[path][slot], value, 1e-9, f"{path} of slot {slot}")


def test_a_slot_without_rows_is_not_touched() -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    optimizer = llfx.SlotOptimizer(gm, MAKERS["AdamW"])
    for step in range(2):
        ids = torch.tensor([0, -1, 0])
        before = {name: value[1:].clone() for name, value in llfx.adapter_state_dict(gm).items()}
        loss_of_rows(gm(inputs(3, 4), adapter_ids=ids), step).sum().backward()
        optimizer.step([ids])
        optimizer.zero_grad()
        for name, value in llfx.adapter_state_dict(gm).items():
            assert torch.equal(value[1:], before[name])
    assert [len(each.state) > 0 for each in optimizer.slots] == [True, False, False]


def test_states_are_saved_loaded_and_reset() -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    ids = torch.tensor([0, 1, 0])
    twin, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    one, other = llfx.SlotOptimizer(gm, MAKERS["AdamW"]), llfx.SlotOptimizer(twin, MAKERS["AdamW"])

    def step(model: Any, optimizer: llfx.SlotOptimizer) -> None:
        optimizer.zero_grad()
        loss_of_rows(model(inputs(3, 4), adapter_ids=ids), 0).sum().backward()
        optimizer.step(ids)

    step(gm, one)
    llfx.load_adapter_state_dict(twin, llfx.adapter_state_dict(gm))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    step(gm, one)
    step(twin, other)
    for name, value in llfx.adapter_state_dict(gm).items():
        assert torch.equal(value, llfx.adapter_state_dict(twin)[name])
    one.reset(0)
    assert not one.slots[0].state
    assert one.slots[1].state


def test_mistakes() -> None:
    gm, _ = banked(llfx.LoRA(r=2, **EVERYWHERE))
    optimizer = llfx.SlotOptimizer(gm, MAKERS["SGD"])
    with pytest.raises(llfx.AdapterError, match="adapter_ids has 7, and the bank has 3 slots"):
        optimizer.step(torch.tensor([7]))
    with pytest.raises(llfx.ConfigError, match="The state is of 1 slots, and the bank has 3"):
        optimizer.load_state_dict({"slots": [{}]})
    for parameter in llfx.adapter_parameters(gm):
        parameter.requires_grad_(False)
    with pytest.raises(llfx.AdapterError, match="No tensor of the bank requires grad"):
        llfx.SlotOptimizer(gm, MAKERS["SGD"])
