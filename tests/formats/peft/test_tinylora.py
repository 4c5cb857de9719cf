"""Whose vector is whose in PEFT's files of TinyLoRA, and which of them cannot be read or written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import randomise

TENSORS = "adapter_model.safetensors"


class OutOfOrder(nn.Module):
    """Runs its modules in another order than it has them. Two have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.second = nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.second(self.first(x).tanh()).tanh())
        return y


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def base() -> nn.Module:
    torch.manual_seed(0)
    return OutOfOrder().eval()


def saved_by_peft(folder: Path, **fields: Any) -> Tensor:
    """Save an adapter with random vectors, and return the output of the model with it."""
    config = peft.TinyLoraConfig(r=2, u=3, target_modules=["last", "first", "second"], **fields)
    model = peft.get_peft_model(copy.deepcopy(base()), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(str(folder))
    y: Tensor = model(X).detach()
    return y


@pytest.mark.parametrize("seed", [42, 7])
def test_each_module_gets_the_vector_that_peft_numbers_by_the_order_of_modules(seed: int, tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path, projection_seed=seed)
    gm = llfx.load_peft(base(), tmp_path).eval()
    assert torch.allclose(gm(X), expected, atol=1e-6)
    assert not torch.allclose(base()(X), expected, atol=1e-2)
    assert len(llfx.adapter_parameters(gm)) == 3


def test_vectors_whose_modules_cannot_be_told_are_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.second.tinylora_P"] += 1
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    with pytest.raises(llfx.CheckpointError, match=r"which of the vectors is that of base_model\.model\.second"):
        llfx.load_peft(base(), tmp_path)


@pytest.mark.parametrize("tying", [0.0, 1.0])
def test_a_file_without_projections_is_refused_with_the_reason(tying: float, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Specified to not save projection"):
        saved_by_peft(tmp_path, weight_tying=tying, save_projection=False)
    with pytest.raises(llfx.CheckpointError, match="save_projection=True"):
        llfx.load_peft(base(), tmp_path)


def test_vectors_of_groups_of_modules_are_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, weight_tying=0.5)
    with pytest.raises(llfx.CheckpointError, match=r"TINYLORA with \{'weight_tying': 0\.5\}"):
        llfx.load_peft(base(), tmp_path)


def test_vectors_whose_numbers_the_projections_tell_go_back_to_peft(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "theirs", projection_seed=7)
    gm = llfx.load_peft(base(), tmp_path / "theirs").eval()
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.normal_()
    llfx.save_peft(gm, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    assert torch.allclose(theirs(X), gm(X), atol=1e-5)
    assert torch.allclose(llfx.load_peft(base(), tmp_path / "ours").eval()(X), gm(X), atol=1e-6)
    assert not torch.allclose(base()(X), gm(X), atol=1e-2)


def test_vectors_whose_numbers_nothing_tells_are_not_written(tmp_path: Path) -> None:
    gm = llfx.rewrite(base(), llfx.TinyLoRA(u=3, target_names="."))
    with pytest.raises(llfx.ConfigError, match=r"The way out: TinyLoRA\(tied=True\)"):
        llfx.save_peft(gm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_vector_for_all_sites_goes_to_peft(tmp_path: Path) -> None:
    gm = llfx.rewrite(base(), llfx.TinyLoRA(r=5, u=3, tied=True, target_names=".")).eval()  # one site has rank 4
    randomise(gm, 0)
    llfx.save_peft(gm, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert torch.allclose(theirs(X), gm(X), atol=1e-5)
    assert not torch.allclose(base()(X), gm(X), atol=1e-2)


def test_projections_differ_from_site_to_site_and_follow_the_seed() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        gm = llfx.rewrite(base(), llfx.TinyLoRA(r=2, u=500, projection_seed=seed, target_names="."))
        return {name: value for name, value in llfx.adapter_state_dict(gm).items() if name.endswith("lora_P")}

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["last.lora_P"], one["second.lora_P"])
    assert one["last.lora_P"].std().item() == pytest.approx(2**-0.5, rel=0.05)  # as in PEFT


def test_the_factors_are_halves_of_the_largest_part_of_the_weight() -> None:
    gm = llfx.rewrite(base(), llfx.TinyLoRA(r=2, target_names="second"))
    p = llfx.adapter_state_dict(gm)
    a, b = p["second.lora_A"], p["second.lora_B"]
    u, s, vh = torch.linalg.svd(base().get_parameter("second.weight").detach())
    assert torch.allclose(b @ a, u[:, :2] * s[:2] @ vh[:2], atol=1e-5)
    assert torch.allclose(a @ a.t(), s[:2].diag(), atol=1e-5)
    assert torch.allclose(b.t() @ b, s[:2].diag(), atol=1e-5)
