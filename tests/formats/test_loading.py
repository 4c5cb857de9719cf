"""Loading onto a model that has adapters: refused unless it is asked for, by every function that loads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import placements
from tests.support.conformance import randomise
from tests.support.models import one_layer_llama
from tests.support.selection import broad_after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


X = torch.randn(3, 8)
WAYS: dict[str, tuple[Any, Any]] = {
    "load": (llfx.save, llfx.load),
    "load_peft": (llfx.save_peft, llfx.load_peft),
    "load_lora_lite": (llfx.save_lora_lite, llfx.load_lora_lite),
}


@pytest.fixture(params=broad_after(1, WAYS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, str, Tensor]:
    """A function that loads, by its name too, with a file for it and what the adapter adds to the base's output."""
    save, load = WAYS[request.param]
    gm = llfx.rewrite(Net(), llfx.LoRA(r=2, target_names="fc"))
    randomise(gm, 3)
    save(gm, tmp_path / "adapter")
    return request.param, load, str(tmp_path / "adapter"), gm.eval()(X).detach() - Net()(X).detach()


def test_a_second_load_is_an_error_that_names_both_ways(case: tuple[str, Any, str, Tensor]) -> None:
    name, load, path, _ = case
    gm = load(Net(), path)
    before = llfx.adapter_state_dict(gm)
    with pytest.raises(llfx.AdapterError) as error:
        load(gm, path)
    message = str(error.value)
    assert "has adapters already: LoRA(r=2, alpha=16) at 1 site" in message
    assert f"llfx.{name}(model, {path!r}, stack=True)" in message
    assert f"llfx.{name}(llfx.remove(model), {path!r})" in message
    assert f"llfx.load_adapter_state_dict(model, llfx.adapter_state_dict(llfx.{name}(llfx.remove(model)" in message
    assert len(placements(gm)) == 1
    assert llfx.adapter_state_dict(gm).keys() == before.keys()


def test_the_ways_that_the_error_names_do_what_it_says(case: tuple[str, Any, str, Tensor]) -> None:
    _, load, path, added = case
    gm, x, base = load(Net(), path), X, Net()(X).detach()
    stacked = load(gm, path, stack=True).eval()
    assert torch.allclose(stacked(x), base + 2 * added, atol=1e-5)
    randomise(gm, 4)
    assert torch.allclose(load(llfx.remove(gm), path).eval()(x), base + added, atol=1e-6)
    llfx.load_adapter_state_dict(gm, llfx.adapter_state_dict(load(llfx.remove(gm), path)))
    assert torch.allclose(gm.eval()(x), base + added, atol=1e-6)


def test_an_adapted_program_is_not_loaded_onto_either(case: tuple[str, Any, str, Tensor]) -> None:
    _, load, path, _ = case
    program = torch.export.export(load(Net(), path, (X,)).eval(), (X,))
    with pytest.raises(llfx.AdapterError, match="stack=True"):
        load(program, path)
    assert len(placements(load(program, path, stack=True))) == 2


def test_the_functions_that_load_have_one_signature_and_its_documentation() -> None:
    of_peft = {"revision", "subfolder", "is_trainable"}  # which its files alone come from, and its own argument
    signatures = {
        tuple((p.name, p.kind, p.default) for p in inspect.signature(load).parameters.values() if p.name not in of_peft)
        for _, load in WAYS.values()
    }
    assert len(signatures) == 1
    for name, (_, load) in WAYS.items():
        assert load.__name__ == name
        documentation = inspect.getdoc(load) or ""
        assert all(f"    {argument}: " in documentation for argument in inspect.signature(load).parameters)


def test_adapt_does_not_load_onto_an_adapted_model_either(tmp_path: Path) -> None:
    model = one_layer_llama()
    wrapped = llfx.wrap(model, llfx.LoRA(r=2, target_names="q_proj"), {"input_ids": torch.tensor([[1, 2, 3]])})
    llfx.save(wrapped, tmp_path / "adapter")
    with pytest.raises(llfx.AdapterError, match="is adapted already"):
        llfx.adapt(wrapped, tmp_path / "adapter")
    with pytest.raises(llfx.AdapterError, match="wrapped eagerly already, or adapted"):
        llfx.load(wrapped, tmp_path / "adapter")
