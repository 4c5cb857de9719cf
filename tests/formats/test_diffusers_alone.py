"""Files of `save_lora_adapter` of one model of diffusers: the same keys and config, without the name of a component."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise

FILE = "pytorch_lora_weights.safetensors"


class UNetOfTwo(nn.Module):
    """A module whose class and parts are called like those of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.Linear(4, 6)])
        self.mid_block = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.mid_block(torch.tanh(self.down_blocks[0](x)))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def saved(folder: Path, metadata: bool, cfg: llfx.Variant) -> Tensor:
    """Write a file of the model alone, from the pipeline's; return what its adapter computes."""
    gm = llfx.rewrite(UNetOfTwo(), cfg).eval()
    randomise(gm, 1)
    llfx.save_diffusers(gm, folder)
    state = {name.removeprefix("unet."): value for name, value in load_file(folder / FILE).items()}
    with safe_open(folder / FILE, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    config = {name.removeprefix("unet."): value for name, value in fields.items()}
    known = {"lora_adapter_metadata": json.dumps({**config, "peft_type": "LORA", "task_type": None})}
    save_file(state, folder / FILE, {"format": "pt", **(known if metadata else {})})
    expected: Tensor = gm(X)
    return expected.detach()


@pytest.mark.broad
@pytest.mark.parametrize("component", [None, "unet"])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_of_the_model_alone_is_read(metadata: bool, component: str | None, tmp_path: Path) -> None:
    expected = saved(tmp_path, metadata, llfx.LoRA(r=2, alpha=5.0 if metadata else 2.0, target_names="."))
    model = UNetOfTwo()
    assert not torch.allclose(model(X), expected, atol=1e-3)
    for each in (model, llfx.capture(model), torch.export.export(model, (X,))):
        torch.testing.assert_close(llfx.load_diffusers(each, tmp_path, component=component)(X), expected)


def test_one_part_alone_is_not_taken_for_a_component(tmp_path: Path) -> None:
    expected = saved(tmp_path, True, llfx.LoRA(r=2, target_names="mid_block"))
    torch.testing.assert_close(llfx.load_diffusers(UNetOfTwo(), tmp_path)(X), expected)


class UNetInside(nn.Module):
    """A model of which a part has the name that a pipeline has for the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.unet(x)
        return y


def test_the_name_of_a_component_is_one_although_a_part_of_the_model_has_it_too(tmp_path: Path) -> None:
    gm = llfx.rewrite(UNetInside(), llfx.LoRA(r=2, target_names=".")).eval()
    randomise(gm, 1)
    llfx.save_diffusers(gm, tmp_path)
    torch.testing.assert_close(llfx.load_diffusers(UNetInside(), tmp_path)(X), gm(X))


def test_a_file_of_other_parts_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, True, llfx.LoRA(r=2, target_names="."))
    state = load_file(tmp_path / FILE)
    save_file({f"text_encoder.{name}": value for name, value in state.items()}, tmp_path / FILE)
    with pytest.raises(llfx.CheckpointError, match=r"nothing for 'unet'; it has adapters of text_encoder"):
        llfx.load_diffusers(UNetOfTwo(), tmp_path)
