"""Buffers that training changes: files of `save` hold them, and loads check and read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.selection import broad_after
from tests.support.statistics import LORA, STATISTICS, X, counted, graph, silent, trained
from tests.support.untouched import untouched


def buffers_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return sorted(json.loads(opened.metadata()["lora_lite_fx"]).get("buffers", []))


def as_graph(model: nn.Module) -> Any:
    return llfx.rewrite(model, LORA, (X,))


def wrapped(model: nn.Module) -> Any:
    return llfx.wrap(model, LORA, (X,))


# Files.


@pytest.mark.parametrize("adapt", broad_after(1, [as_graph, wrapped]))
def test_a_file_brings_the_statistics_back(adapt: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    base, file = counted(), tmp_path / "adapter.safetensors"
    before = base(X)
    with untouched(base):
        model = trained(adapt(base))
        expected = model(X)
        with silent():
            llfx.save(model, file)
            assert buffers_in(file) == STATISTICS
            again = llfx.load(base, file, (X,))
        assert torch.allclose(again(X), expected, atol=1e-6)
        assert not torch.allclose(expected, before, atol=0.1)
        trained(again)
    assert again.get_buffer("norm.num_batches_tracked").dtype == torch.int64
    assert again.get_buffer("norm.num_batches_tracked") == 4


def test_statistics_that_stayed_are_not_written(tmp_path: Path) -> None:
    base, gm = graph()
    gm = llfx.rewrite(gm, LORA)
    gm(X)
    with silent():
        llfx.save(gm, tmp_path / "adapter.safetensors")
        llfx.adapter_state_dict(gm)
        llfx.save_peft(gm, tmp_path / "peft")
        with llfx.active(gm, None):
            assert torch.equal(gm(X), base(X))
    assert buffers_in(tmp_path / "adapter.safetensors") == []
    assert "norm.running_mean" not in load_file(tmp_path / "adapter.safetensors")


class Symbolic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.fc(x))
        return y


def test_statistics_of_a_traced_model_and_an_exported_one_are_one_file(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    for first, second in ((None, (x,)), ((x,), None)):
        base = Symbolic()
        gm = llfx.rewrite(base.eval(), LORA, first).train()
        gm(3 * x + 1)
        llfx.save(gm, tmp_path / "adapter.safetensors")
        again = llfx.load(base, tmp_path / "adapter.safetensors", second)
        assert torch.allclose(again.eval()(x), gm.eval()(x), atol=1e-6)
        assert torch.allclose(llfx.remove(gm).eval()(x), base(x), atol=1e-6)


def test_the_statistics_of_a_wrapped_norm_are_in_the_file(tmp_path: Path) -> None:
    cfg, file = llfx.Full(target_names="norm"), tmp_path / "adapter.safetensors"
    base = counted()
    model = llfx.wrap(base, cfg, (X,))
    model.train()(3 * X)
    llfx.save(model, file)
    assert buffers_in(file) == STATISTICS
    again = llfx.load(base, file, (X,))
    assert torch.allclose(again(X), model.eval()(X), atol=1e-6)


def edited(file: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    with safe_open(file, framework="pt") as opened:
        document = json.loads(opened.metadata()["lora_lite_fx"])
    tensors = load_file(file)
    edit(tensors, document)
    save_file(tensors, file, {"lora_lite_fx": json.dumps(document)})


def renamed(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    def edit(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        tensors[name] = tensors.pop("norm.running_mean")
        document["buffers"] = [name if each == "norm.running_mean" else each for each in document["buffers"]]

    return edit


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "another name": (renamed("norm.other"), "holds the buffer 'norm.other', which the model does not have"),
    "a weight": (renamed("fc.weight"), "holds the buffer 'fc.weight', which the model does not have"),
    "an attribute": (renamed("graph"), "holds the buffer 'graph', which the model does not have"),
    "another shape": (
        lambda tensors, _: tensors.update({"norm.running_mean": torch.zeros(5)}),
        r"'norm.running_mean' of shape \(5,\).*the model has it of \(4,\)",
    ),
    "another type": (
        lambda tensors, _: tensors.update({"norm.running_mean": torch.zeros(4, dtype=torch.int64)}),
        "in torch.int64, and the model has it of",
    ),
    "no list": (lambda _, document: document.update(buffers="norm"), "its metadata is damaged: buffers must be a list"),
    "not in the file": (lambda tensors, _: tensors.pop("norm.running_var"), "its metadata is damaged: buffers must be"),
    "not listed": (lambda _, document: document["buffers"].pop(), "unexpected: norm"),
    "another value": (lambda tensors, _: tensors["norm.running_var"].add_(1), "is corrupt"),
    "NaN": (lambda tensors, _: tensors["norm.running_var"].fill_(torch.nan), "is corrupt"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_with_other_buffers_than_the_models_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    base, gm = graph()
    file = tmp_path / "adapter.safetensors"
    llfx.save(trained(llfx.rewrite(gm, LORA)), file)
    edited(file, edit)
    with untouched(base, gm), pytest.raises(llfx.CheckpointError, match=message):
        llfx.load(gm, file)


def test_statistics_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    gm = trained(llfx.rewrite(graph()[1], LORA))
    gm.get_buffer("norm.running_var").fill_(torch.inf)
    with pytest.raises(llfx.CheckpointError, match=r"norm\.running_var.*nothing was written"):
        llfx.save(gm, tmp_path / "adapter.safetensors")


def test_a_model_that_was_cast_has_no_other_statistics_by_that(tmp_path: Path) -> None:
    gm = llfx.rewrite(graph()[1], LORA).to(torch.bfloat16)
    llfx.save(gm, tmp_path / "adapter.safetensors")
    assert buffers_in(tmp_path / "adapter.safetensors") == []
    gm.train()(X.to(torch.bfloat16))
    llfx.save(gm, tmp_path / "adapter.safetensors")
    assert buffers_in(tmp_path / "adapter.safetensors") == STATISTICS
    mean: Any = graph()[0].norm.running_mean
    assert torch.equal(llfx.remove(gm).get_buffer("norm.running_mean"), mean.to(torch.bfloat16))
