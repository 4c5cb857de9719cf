"""The variants that start from a part of the weight: OLoRA and AntiPaSTO (PiSSA: test_variants.py)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.conformance import close, randomise
from tests.support.selection import broad_after

D_IN, D_OUT, R, F64 = 12, 8, 4, torch.float64


def linear() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).double()


def inputs(count: int = 30) -> Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(1), dtype=F64)


# OLoRA.


def test_olora_starts_at_the_first_part_of_the_qr_factorization_and_its_scale_is_in_the_residual() -> None:
    net = linear()
    gm = llfx.rewrite(net, llfx.OLoRA(r=R, alpha=6.0, target_names=("0",)))
    q, r = torch.linalg.qr(net[0].weight.detach())
    for name, start in (("lora_A", r[:R]), ("lora_B", q[:, :R])):
        assert torch.allclose(gm.get_parameter(f"0.{name}").detach(), start)
        assert torch.allclose(gm.get_buffer(f"0.{name}0"), start)
    assert torch.equal(gm(inputs()), net(inputs())), "identity at the start, exactly"
    randomise_trained(gm)
    a, b = gm.get_parameter("0.lora_A"), gm.get_parameter("0.lora_B")
    weight = net[0].weight - 1.5 * q[:, :R] @ r[:R] + 1.5 * b @ a
    assert torch.allclose(llfx.merge(gm).get_parameter("0.weight"), weight, atol=1e-12)
    assert torch.equal(llfx.remove(gm).get_parameter("0.weight"), net[0].weight)


def randomise_trained(gm: nn.Module) -> None:
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=F64) + 0.1)


# AntiPaSTO.


def rotation(angles: Tensor, size: int, largest: float) -> Tensor:
    """The block of one row of angles: pairs of a block above the diagonal, row by row."""
    bound = 2 * math.tan(largest / 2)
    skew = torch.zeros(size, size, dtype=F64)
    for k, (i, j) in enumerate(itertools.combinations(range(size), 2)):
        skew[i, j] = bound * math.tanh(angles[k].item() / (2 * bound)) / 2
        skew[j, i] = -skew[i, j]
    identity = torch.eye(size, dtype=F64)
    rotation: Tensor = torch.linalg.inv(identity - skew) @ (identity + skew)
    return rotation


@pytest.mark.parametrize("basis", broad_after(1, ["V", "U", "none"]))
@pytest.mark.parametrize("size", broad_after(1, [2, 4]))
def test_antipasto_rewritten_wrapped_and_merged_is_its_formula(basis: Any, size: int) -> None:
    net = linear()
    cfg = llfx.AntiPaSTO(r=R, block_size=size, rotate_basis=basis, max_rotation_angle=0.7, target_names=("0",))
    gm, wrapped = llfx.rewrite(net, cfg), llfx.wrap(net, cfg)
    randomise_trained(gm)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(gm))
    u, s, vh = (tensor[..., :R] if i < 2 else tensor[:R] for i, tensor in enumerate(torch.linalg.svd(net[0].weight)))
    new_u, new_vh = u, vh
    if basis != "none":
        turn = torch.block_diag(*(rotation(angles, size, 0.7) for angles in gm.get_parameter("0.lora_rot_T")))
        new_u, new_vh = (u, turn @ vh) if basis == "V" else (u @ turn.t(), vh)
    new_s = s + gm.get_parameter("0.lora_delta_s")
    weight = net[0].weight - u @ s.diag() @ vh + new_u @ new_s.diag() @ new_vh
    expected = inputs() @ weight.t() + net[0].bias
    for y in (gm(inputs()), wrapped(inputs()), llfx.merge(gm)(inputs())):
        assert torch.allclose(y, expected, atol=1e-12)


def test_antipasto_turns_no_further_than_its_largest_angle() -> None:
    cfg = llfx.AntiPaSTO(r=2, block_size=2, max_rotation_angle=0.3, target_names=("0",))
    gm = llfx.rewrite(linear(), cfg)
    with torch.no_grad():
        gm.get_parameter("0.lora_rot_T").fill_(1e6)
        gm.get_parameter("0.lora_delta_s").zero_()
    u, s, vh = torch.linalg.svd(linear()[0].weight.detach())
    moved = (llfx.merge(gm).get_parameter("0.weight") - linear()[0].weight).detach()
    new_vh = (u[:, :2] / s[:2]).t() @ (moved + u[:, :2] @ s[:2].diag() @ vh[:2])
    cosine = (new_vh * vh[:2]).sum(1)
    assert torch.allclose(cosine, torch.full((2,), math.cos(0.3), dtype=F64))


@pytest.mark.parametrize("basis", broad_after(1, ["V", "U", "none"]))
def test_antipasto_starts_near_the_identity_and_leaves_the_weight_alone(basis: Any) -> None:
    net = linear()
    gm = llfx.rewrite(net, llfx.AntiPaSTO(r=R, rotate_basis=basis, target_names=("0",)))
    difference = (gm(inputs()) - net(inputs())).abs().max()
    # Singular values move by 4e-4 on average, and inputs have a length of about 3.5.
    assert 0 < difference < 2e-2
    assert gm.get_parameter("0.weight").data_ptr() == net[0].weight.data_ptr()


def test_antipasto_keeps_its_near_identity_under_autocast() -> None:
    net = linear().float()
    gm = llfx.rewrite(net, llfx.AntiPaSTO(r=R, target_names=("0",)))
    x = inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (gm(x) - net(x)).abs().max() < 2e-2


def test_a_calibrated_antipasto_file_keeps_its_own_directions_on_loading(tmp_path: Path) -> None:
    """The trap: taking the largest triplets out of the weight again, and not those that were chosen."""
    net = linear()
    smallest = torch.linalg.svd(net[0].weight.detach()).Vh[4:8]
    gm = llfx.rewrite(net, llfx.AntiPaSTO(r=R, target_names=("0",)), calibration=[(100 * smallest,)])
    assert not torch.allclose(gm.get_buffer("0.lora_S"), torch.linalg.svdvals(net[0].weight.detach())[:R])
    randomise_trained(gm)
    llfx.save(gm, tmp_path / "adapter")
    loaded = llfx.load(linear(), tmp_path / "adapter")
    assert torch.equal(loaded(inputs()), gm(inputs()))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"r": 6}, "multiple of block_size=4"),
        ({"block_size": 1}, "at least 2"),
        ({"max_rotation_angle": 0.0}, "between 0 and pi"),
        ({"max_rotation_angle": 3.2}, "between 0 and pi"),
        ({"rotate_basis": "W"}, "one of 'V', 'U', 'none'"),
    ],
)
def test_antipasto_refuses_impossible_fields(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(llfx.ConfigError, match=part):
        llfx.AntiPaSTO(**fields)


def test_a_weight_start_on_another_base_is_refused(tmp_path: Path) -> None:
    other = linear()
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    for cls in (llfx.OLoRA, llfx.AntiPaSTO):
        gm = llfx.rewrite(linear(), cls(r=R, target_names=("0",)))
        randomise(gm, 0)
        llfx.save(gm, tmp_path / "adapter")
        with pytest.raises(llfx.CheckpointError, match="other weights"):
            llfx.load(other, tmp_path / "adapter")


# LoRA-XS.


def test_the_frozen_factors_of_lora_xs_are_the_largest_part_of_the_weight() -> None:
    net: Any = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
    gm = llfx.rewrite(net, llfx.LoRAXS(r=R, alpha=6.0, target_names="0"))
    p = llfx.adapter_state_dict(gm)
    u, s, vh = torch.linalg.svd(net[0].weight.detach())
    close(p["0.lora_B"] @ p["0.lora_A"], u[:, :R] * s[:R] @ vh[:R], 1e-9, "B A")
    close(p["0.lora_B"].t() @ p["0.lora_B"], torch.eye(R).double(), 1e-9, "the columns of B")
    assert 0.5e-5 < p["0.lora_R"].std() < 2e-5
    core = torch.randn(R, R).double()
    llfx.load_adapter_state_dict(gm, {**p, "0.lora_R": core})
    x = torch.randn(3, D_IN).double()
    weight = net[0].weight + 6 / R * p["0.lora_B"] @ core @ p["0.lora_A"]
    close(gm(x), x @ weight.t() + net[0].bias, 1e-9, "the formula")
