"""PEFT's `bias="all"` and `bias="lora_only"`, by every method: outputs, gradients and files, both ways."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close
from tests.support.captured import captured
from tests.support.peft_oracles import ORACLES, Oracle
from tests.support.releases import since
from tests.support.selection import DISTINCT, broad_after, broad_unless, slow_unless


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
TARGETS = {"target_modules": ["0", "2"]}


def config(oracle: Oracle, bias: str) -> peft.PeftConfig | None:
    """Return PEFT's config of a method; None if the method has no such field."""
    extra = {"feedforward_modules": ["2"]} if oracle.cls is llfx.IA3 else {}
    made = oracle.config(**TARGETS, **extra)
    if "bias" not in {field.name for field in dataclasses.fields(made)}:
        return None
    return oracle.config(**TARGETS, **extra, bias=bias)


METHODS = [name for name, oracle in ORACLES.items() if config(oracle, "none") is not None]
EVERYDAY = ("DoRA", "BOFT", "GLoRA lora lora constant")
BROAD = {*EVERYDAY, *DISTINCT}


def trained(name: str, bias: str) -> tuple[nn.Module, Any]:
    """Return the base and PEFT's model of it, whose trained parameters have random values."""
    model, _ = captured(net, inputs=(X,))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(ORACLES[name], bias))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter) + 0.1)
    return model, theirs.eval()


def file_of_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the gradients under the names of a PEFT file: they are put in the place of the values, and written."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    (model.save_pretrained if hasattr(model, "save_pretrained") else lambda path: llfx.save_peft(model, path))(folder)
    return load_file(folder / "adapter_model.safetensors")


@since(
    "peft", "0.21", "PEFT writes trained biases of every method"
)  # its own files lacked them, or could not be written
@pytest.mark.parametrize("bias", broad_after(1, ["all", "lora_only"]))
@pytest.mark.parametrize("name", broad_unless(EVERYDAY.__contains__, slow_unless(BROAD.__contains__, METHODS)))
def test_trained_biases_are_those_of_the_adapter(name: str, bias: str, tmp_path: Path) -> None:
    model, theirs = trained(name, bias)
    theirs.save_pretrained(tmp_path / "theirs")
    gm = llfx.load_peft(captured(net, inputs=(X,))[1], tmp_path / "theirs").eval()
    expected = theirs(X)
    assert (expected - model(X)).abs().max() > 0.05
    close(gm(X), expected, 2e-5, "output")
    close(llfx.merge(gm)(X), expected, 2e-5, "merged")
    llfx.save_peft(gm, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    close(again.eval()(X), expected, 2e-5, "output of what PEFT reads")

    for each in (gm, theirs):
        each(X).sin().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    biases = {name for name in grads if name.endswith("bias") and "lora_" not in name}
    assert len(biases) == (3 if bias == "all" else 2)
    ours, expected_file = (file_of_gradients(each, tmp_path / f"{i}") for i, each in enumerate((gm, theirs)))
    of_biases = [key for key in expected_file if key.endswith("bias")]
    assert len(of_biases) >= len(biases)
    for key in of_biases:
        close(ours[key], expected_file[key], 2e-5, f"gradient of {key}")
