"""Adapters with values that are not finite: neither saved, nor loaded, nor merged in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import lora_lite_fx as llfx
from lora_lite_fx.formats.safetensors_files import check_finite
from tests.support.selection import broad_after

SAVE: dict[str, Callable[..., None]] = {
    "save": llfx.save,
    "save_peft": llfx.save_peft,
    "save_lora_lite": llfx.save_lora_lite,
}
LOAD: dict[str, Callable[..., fx.GraphModule]] = {
    "save": llfx.load,
    "save_peft": llfx.load_peft,
    "save_lora_lite": llfx.load_lora_lite,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def adapted(value: float | None = None, base: nn.Module | None = None) -> fx.GraphModule:
    """A graph with an adapter at both linears; `value` stands in the second one's `lora_B`."""
    gm = llfx.rewrite(base or Net(), llfx.LoRA(r=2, target_names=".", dtype=torch.float32))
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.fill_(0.5)
        if value is not None:
            gm.get_parameter("second.lora_B")[1, 1] = value
    return gm


@pytest.mark.parametrize("value", broad_after(1, [float("nan"), float("inf"), -float("inf")]))
@pytest.mark.parametrize("how", SAVE)
def test_it_is_not_saved_and_the_old_file_stays(how: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    SAVE[how](adapted(), path)
    files = {file: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}
    with pytest.raises(llfx.CheckpointError, match=r"second\.lora_B.*: 1 of 8 values.*nothing was written.*allow_nonf"):
        SAVE[how](adapted(value), path)
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.parametrize("value", broad_after(1, [float("nan"), -float("inf")]))
@pytest.mark.parametrize("how", broad_after(1, SAVE))
def test_it_is_saved_and_loaded_if_that_is_asked_for(how: str, value: float, tmp_path: Path) -> None:
    path, gm = tmp_path / "adapter", adapted(value)
    SAVE[how](gm, path, allow_nonfinite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other weights
        with pytest.raises(llfx.CheckpointError, match=r"second\.lora_B.*: 1 of 8 values.*it is not loaded"):
            LOAD[how](Net(), path)
        loaded = LOAD[how](Net(), path, allow_nonfinite=True)
    assert torch.equal(loaded.get_parameter("second.lora_B"), gm.get_parameter("second.lora_B")) or value != value
    assert torch.equal(loaded.get_parameter("second.lora_B").isfinite(), gm.get_parameter("second.lora_B").isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2])
def test_every_dtype_is_checked(dtype: torch.dtype) -> None:
    check_finite({"a": torch.ones(3).to(dtype), "b": torch.arange(3)}, Path("file"), "")
    with pytest.raises(llfx.CheckpointError, match="a: 1 of 3"):
        check_finite({"a": torch.tensor([1.0, float("inf"), 0.0]).to(dtype)}, Path("file"), "")


# Merging.


def test_merging_values_that_are_not_finite_is_an_error_that_names_the_site() -> None:
    gm = adapted(float("nan"))
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    with pytest.raises(llfx.AdapterError, match=r"8 of 32 values of the merged weight of 'second' are NaN or infinite"):
        llfx.merge(gm)
    assert all(torch.equal(before[name], tensor) or name == "second.lora_B" for name, tensor in gm.state_dict().items())


@pytest.mark.broad
def test_a_result_too_large_for_the_base_is_an_error_that_names_the_site() -> None:
    gm = adapted(3e5, Net().half())
    with pytest.raises(
        llfx.AdapterError,
        match=r"8 of 32 values of the merged weight of 'second' are too large for torch.float16: up to .*6\.55e\+04",
    ):
        llfx.merge(gm)
    llfx.merge(adapted(3e5, Net().bfloat16()))


def test_a_bias_too_large_for_the_base_is_an_error() -> None:
    gm = llfx.rewrite(Net().half(), llfx.IA3(target_names="first", dtype=torch.float32))
    with torch.no_grad():
        gm.get_parameter("first.lora_g").fill_(1e5)
        gm.get_parameter("first.bias").fill_(30000.0)
        gm.get_parameter("first.weight").fill_(0.0)
    with pytest.raises(llfx.AdapterError, match=r"8 of 8 values of the merged bias of 'first' are too large"):
        llfx.merge(gm)


@pytest.mark.parametrize("name", ["second.weight", "first.bias"])
def test_a_base_that_is_not_finite_itself_would_spread(name: str) -> None:
    """Merging computes `f(I) - f(0)`, in which infinity becomes NaN at other places too."""
    base = Net()
    with torch.no_grad():
        base.get_parameter(name).flatten()[0] = -float("inf")
    with pytest.raises(llfx.AdapterError, match=rf"merged weight of '{name[:5]}.*' are NaN .*frozen tensors are"):
        llfx.merge(adapted(base=base))
