"""diffusers' LoRA files, both ways, against diffusers' own loading and saving."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.diffusers_models import INPUTS, unet

pytest.importorskip("diffusers")

FILE = "pytorch_lora_weights.safetensors"
CONFIGS = {
    "LoRA": llfx.LoRA(r=2, alpha=3.0, target_roles=("attention",)),
    "several ranks": llfx.LoRA(r=2, alpha=3.0, target_roles=("attention",), rank_pattern={"to_q": 3}),
    "DoRA": llfx.DoRA(r=2, target_roles=("attention",)),
    "convolutions": llfx.LoRA(r=2, target_names=("conv1", "proj_in"), target_kinds=("linear", "conv")),
    "PiSSA": llfx.PiSSA(r=2, target_roles=("attention",)),
}


@functools.cache
def base() -> tuple[Any, Any]:
    model = unet()
    return model, llfx.capture(model, INPUTS)


def adapted(cfg: llfx.Variant) -> Any:
    gm = llfx.rewrite(base()[1], cfg)
    randomise(gm, 0)
    return gm.eval()


def sample(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**INPUTS).sample
    return result


def in_diffusers(folder: Path) -> Any:
    """Return a UNet into which diffusers has loaded the file, as `load_lora_weights` of a pipeline does."""
    import diffusers

    model = unet()
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(str(folder), return_lora_metadata=True)
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_computes_what_was_saved_and_it_loads_again(name: str, tmp_path: Path) -> None:
    gm = adapted(CONFIGS[name])
    llfx.save_diffusers(gm, tmp_path)
    expected = sample(gm)
    assert not torch.allclose(expected, sample(base()[0]), atol=1e-3)
    torch.testing.assert_close(sample(in_diffusers(tmp_path)), expected)
    torch.testing.assert_close(sample(llfx.load_diffusers(base()[1], tmp_path)), expected)


def saved_by_diffusers(folder: Path, old: bool, metadata: bool) -> Any:
    """Let diffusers save a LoRA of its own, with an alpha that only metadata tell, and return its UNet."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet()
    alpha = 5 if metadata else 2
    model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(model)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=convert_state_dict_to_diffusers(layers) if old else layers,
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict() if metadata else None,
    )
    return model.eval()


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("metadata", [True, False])
def test_what_diffusers_saves_computes_the_same(old: bool, metadata: bool, tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path, old, metadata)
    assert any("lora.down" in key for key in load_file(tmp_path / FILE)) == old
    torch.testing.assert_close(sample(llfx.load_diffusers(base()[1], tmp_path / FILE)), sample(theirs))


def test_an_alpha_beside_the_factors_scales_them(tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path, old=False, metadata=False)
    state = load_file(tmp_path / FILE)
    expected = sample(llfx.reconfigure(llfx.load_diffusers(base()[1], tmp_path), alpha=6.0))
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    save_file({**state, **{f"{name}.alpha": torch.tensor(6.0) for name in names}}, tmp_path / FILE)
    torch.testing.assert_close(sample(llfx.load_diffusers(base()[1], tmp_path)), expected)


def test_a_component_is_named_or_follows_from_the_class(tmp_path: Path) -> None:
    gm = adapted(CONFIGS["LoRA"])
    llfx.save_diffusers(gm, tmp_path / "a")
    llfx.save_diffusers(gm, tmp_path / "b", component="text_encoder")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a" / FILE)} == {"unet"}
    with pytest.raises(
        llfx.CheckpointError, match=r"nothing for 'unet'; it has adapters of text_encoder\. .*component="
    ):
        llfx.load_diffusers(base()[1], tmp_path / "b")
    again = llfx.load_diffusers(base()[1], tmp_path / "b", component="text_encoder")
    torch.testing.assert_close(sample(again), sample(gm))
    plain = llfx.rewrite(torch.nn.Sequential(torch.nn.Linear(2, 2)), llfx.LoRA(r=1, target_names="0"))
    with pytest.raises(llfx.ConfigError, match="name for this model is not known"):
        llfx.save_diffusers(plain, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_diffusers_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llfx.ConfigError, match="what PEFT calls IA3"):
        llfx.save_diffusers(adapted(llfx.IA3(target_roles=("query",))), tmp_path / "a")
    both = [CONFIGS["LoRA"], llfx.Full(target_names=("conv_out",), target_kinds=("conv",))]
    with pytest.raises(llfx.ConfigError, match=r"conv_out.* beside it"):
        llfx.save_diffusers(llfx.rewrite(base()[1], both), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"lora_unet_mid.lora_down.weight": torch.ones(1, 1)}, "{}", "key of kohya's scripts"),
        ({"unet.mid_block.to_q.alpha": torch.ones(())}, "{}", "no key of it ends in lora_A"),
        (
            {"unet.nowhere.lora_A.weight": torch.ones(1, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 1)},
            "{}",
            "nowhere",
        ),
        ({"unet.x.lora_A.weight": torch.ones(1, 8)}, "[", "is damaged"),
        ({"unet.x.lora_A.weight": torch.ones(1, 8)}, "[]", "is not an object"),
        ({"unet.x.lora_A.weight": torch.ones(1, 8)}, json.dumps({"unet.r": 1, "unet.use_qalora": True}), "use_qalora"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(
    tensors: dict[str, Tensor], config: str, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / FILE, {"format": "pt", "lora_adapter_metadata": config})
    with pytest.raises(llfx.CheckpointError, match=message):
        llfx.load_diffusers(base()[1], tmp_path)
