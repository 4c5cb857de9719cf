"""Each form of PEFT: an adapter of ours goes to a file under its names, and comes back."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config
from lora_lite_fx.formats.peft.form import PeftForm
from lora_lite_fx.formats.peft.methods import all_forms
from tests.support.peft_models import small
from tests.support.selection import broad_unless, is_typical

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
WRITTEN = {form.name + "".join(f" {value}" for value in form.fixed.values()): form for form in all_forms()}
del WRITTEN["TinyLoRA False"]  # which PEFT alone writes
AS_LORA = ("PiSSA", "OLoRA", "LoRAXS")


@functools.cache
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return llfx.capture(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)))


def adapted(form: PeftForm) -> fx.GraphModule:
    if form.variant is llfx.TrainableTokens:
        model, ids = nn.Sequential(nn.Embedding(6, 8)), torch.tensor([1, 2])
        return llfx.rewrite(llfx.capture(model, (ids,)), llfx.TrainableTokens(token_indices=(1,)))
    cfg = small(form.variant, form.fixed, target_names=("^0$",))
    return llfx.rewrite(graph(), cfg, calibration=[(X,)] if form.variant is llfx.EVA else None)


@pytest.mark.parametrize("name", broad_unless(lambda name: is_typical(WRITTEN[name].variant), WRITTEN))
def test_an_adapter_goes_to_a_file_and_comes_back(name: str, tmp_path: Path) -> None:
    form = WRITTEN[name]
    gm = adapted(form)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    llfx.save_peft(gm, tmp_path)
    back = llfx.load_peft(llfx.remove(gm), tmp_path)
    (variant,) = (variant for variant, _ in by_config(back))
    assert type(variant) is (llfx.LoRA if name in AS_LORA else form.variant)
    x = torch.tensor([1, 2]) if form.variant is llfx.TrainableTokens else X
    assert torch.allclose(back.eval()(x), gm.eval()(x), atol=1e-5)
