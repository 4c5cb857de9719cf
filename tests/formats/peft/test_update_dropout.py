"""How `rank_dropout` and `module_dropout` drop in training: PEFT draws other numbers, so what they do is compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.selection import broad_after

CALLS, OUTPUTS, DROP = 300, 12, 0.4
X = {
    "linear": torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double(),
    "conv": torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)).double(),
}
CONFIGS: dict[str, tuple[str, peft.PeftConfig]] = {
    "LoHa": ("linear", peft.LoHaConfig(r=4, rank_dropout=DROP)),
    "LoHa at a convolution": ("conv", peft.LoHaConfig(r=4, rank_dropout=DROP)),
    "LoKr": ("linear", peft.LoKrConfig(r=2, rank_dropout=DROP)),
    "LoKr, scaled": ("linear", peft.LoKrConfig(r=2, rank_dropout=DROP, rank_dropout_scale=True)),
    "LoHa as a whole": ("linear", peft.LoHaConfig(r=4, module_dropout=DROP)),
    "LoKr as a whole": ("linear", peft.LoKrConfig(r=2, module_dropout=DROP)),
}


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(8, OUTPUTS), "conv": nn.Conv2d(8, OUTPUTS, 2)}
    return nn.Sequential(layers[kind]).double()


def kept(adapted: nn.Module, x: Tensor, base: Tensor, update: Tensor) -> Tensor:
    """Return by how much each output of the update is multiplied in one call, which is the same in all rows."""
    with torch.no_grad():
        by_row: Tensor = ((adapted(x) - base) / update).movedim(1, -1).flatten(0, -2)
    assert (by_row - by_row[0]).nan_to_num().abs().max() < 1e-6
    return by_row[0]


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", broad_after(2, CONFIGS))
def test_training_drops_the_same_as_in_peft_and_evaluation_nothing(name: str, tmp_path: Path) -> None:
    kind, config = CONFIGS[name]
    scaled = "LoHa" in name or "scaled" in name
    config = copy.deepcopy(config)
    config.target_modules = {"0"}  # type: ignore[attr-defined]
    x, base_model = X[kind], model(kind)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base_model), config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    ours = llfx.load_peft(base_model, tmp_path, (x,))
    with torch.no_grad():
        base = base_model(x)
        update = theirs.eval()(x) - base
    torch.testing.assert_close(ours.eval()(x), base + update, rtol=1e-6, atol=1e-6)
    assert update.abs().min() > 1e-4, "a small update says nothing of what it is multiplied by"
    fractions = []
    for adapted in (theirs, ours):
        torch.manual_seed(1)
        adapted.train()
        multiples = torch.stack([kept(adapted, x, base, update) for _ in range(CALLS)])
        is_kept = multiples > 0.5
        whole = is_kept.all(1) | ~is_kept.any(1)
        if "whole" in name:
            assert whole.all(), "all outputs or none"
            expected = is_kept.double()
        else:
            assert not whole[:20].all()
            share = is_kept.double().mean(1, keepdim=True) if scaled else torch.ones(CALLS, 1)
            expected = is_kept / share.clamp_min(1e-9)
        finite = multiples.isfinite().all(1)  # where PEFT drops all, it divides by zero
        torch.testing.assert_close(multiples[finite], expected[finite].double(), rtol=1e-6, atol=1e-6)
        fractions.append(is_kept[finite].double().mean().item())
    draws = CALLS * (1 if "whole" in name else OUTPUTS)
    bound = 4 * (DROP * (1 - DROP) / draws) ** 0.5
    for fraction in fractions:
        assert fraction == pytest.approx(1 - DROP, abs=bound)


@pytest.mark.parametrize("cls", [llfx.LoHa, llfx.LoKr])
def test_the_graph_drops_what_the_wrapper_drops_under_the_same_seed(cls: Any) -> None:
    base_model = model("linear")
    cfg = cls(r=2, rank_dropout=DROP, module_dropout=0.2, target_names="0")
    gm, wrapped = llfx.rewrite(base_model, cfg), llfx.wrap(base_model, cfg)
    values = {name: torch.randn_like(value) for name, value in llfx.adapter_state_dict(gm).items()}
    results = []
    for adapted in (gm, wrapped):
        llfx.load_adapter_state_dict(adapted, values)
        torch.manual_seed(2)
        outputs = [adapted.train()(X["linear"]) for _ in range(8)]
        sum(y.square().sum() for y in outputs).backward()
        grads = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        results.append((torch.stack(outputs), grads))
    (y, grads), (expected_y, expected) = results
    assert not torch.equal(y[0], y[1])
    torch.testing.assert_close(y, expected_y)
    assert grads.keys() == expected.keys() == values.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=name)
