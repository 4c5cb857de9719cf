"""Configs that say how an adapter started or was trained, and targets that depend on the model."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.sites.finding import find_sites
from tests.support.peft_models import ResidualMLP, captured
from tests.support.peft_round_trip import round_trip
from tests.support.selection import broad_after

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return ResidualMLP().eval()


def test_lora_under_other_names_goes_both_ways() -> None:
    for config in (
        peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights="mica"),
        peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights="orthogonal"),
        peft.LoraConfig(r=4, target_modules=["fc1"], velora_config=peft.VeloraConfig(num_groups=1)),
    ):
        outcome = round_trip(model(), config, X)
        assert (outcome.read, outcome.written) == ("equal", "equal"), outcome.why


@pytest.mark.parametrize("start", ["lora_ga", "corda"])
def test_a_start_on_another_base_is_read_as_what_it_is_and_said(start: str, tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(copy.deepcopy(model()), peft.LoraConfig(r=4, target_modules=["fc1"])).eval()
    with torch.no_grad():
        theirs.base_model.model.fc1.lora_B["default"].weight.fill_(0.3)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.warns(UserWarning, match=f"'{start}' PEFT changes the base in memory"):
        gm = llfx.load_peft(model(), tmp_path, (X,)).eval()
    assert torch.allclose(gm(X), theirs(X), atol=1e-5)


def test_pissa_by_iteration_is_the_pissa_of_its_tensors(tmp_path: Path) -> None:
    start: Any = "pissa_niter_16"
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=start)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model()), config).eval()
    with torch.no_grad():
        theirs.base_model.model.fc1.lora_B["default"].weight.add_(0.3)
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="factorizes the weight with random numbers"):
        gm = llfx.load_peft(model(), tmp_path, (X,)).eval()
    assert torch.allclose(gm(X), theirs(X), atol=1e-3)


CASES = {
    "all-linear": peft.LoraConfig(target_modules="all-linear"),
    "LoRA's default": peft.LoraConfig(),
    "IA3's default": peft.IA3Config(),
    "FourierFT's default": peft.FourierFTConfig(n_frequency=50),
}


@pytest.mark.parametrize("name", broad_after(1, ["llama", "gpt2", "bert"]))
def test_default_targets_are_those_of_peft(name: str) -> None:
    base, graph = captured(name)
    sites = {site.name: site for site in find_sites(graph)}
    for config in CASES.values():
        variant = llfx.from_peft_config(copy.deepcopy(config), base)
        assert isinstance(variant, llfx.Variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs: Any = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        ours = {name for name, site in sites.items() if variant.selects(site)}
        assert ours == set(theirs.base_model.targeted_module_names)
        if isinstance(variant, llfx.IA3):
            layers = dict(theirs.base_model.model.named_modules())
            for name in ours:
                gate = variant.params(sites[name])["lora_g"]
                assert gate.shape == (layers[name].ia3_l["default"].numel(),)


def test_without_a_model_the_way_out_is_named() -> None:
    for config in (CASES["all-linear"], CASES["LoRA's default"]):
        with pytest.raises(llfx.ConfigError, match=r"from_peft_config\(config, model\)"):
            llfx.from_peft_config(config)
    with pytest.raises(llfx.ConfigError, match="no default targets of LORA for a model of the type None"):
        llfx.from_peft_config(CASES["LoRA's default"], model())
