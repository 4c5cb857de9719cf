"""The forms of AntiPaSTO that train what a weight does in some of its directions: gains, arrowheads, ablations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import close
from tests.support.selection import broad_after

R = 4


@pytest.mark.parametrize("suppress", broad_after(1, [False, True]))
@pytest.mark.parametrize("basis", ["svd", "corda", "asvd"])
def test_gains_scale_the_directions_of_their_basis_and_are_steered_between_calls(basis: str, suppress: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8)).double()
    data = torch.randn(200, 6).double() * torch.tensor([3.0, 1, 1, 0.3, 0.1, 1]) @ torch.randn(6, 6).double()
    x, weight, bias = torch.randn(4, 6).double(), *(tensor.detach() for tensor in net.parameters())
    cfg: Any = {"r": 4, "basis": basis, "suppress_only": suppress, "target_names": "0"}
    gm = llfx.rewrite(net, llfx.AntiPaSTOGain(**cfg), calibration=[(data[:90],), (data[90:],)])
    assert torch.equal(gm(x), net(x)), "the start"
    p = llfx.adapter_state_dict(gm)
    u, s, rows = p["0.lora_U"], p["0.lora_S"], p["0.lora_P"]
    moment = {"svd": torch.eye(6), "corda": data.t() @ data / 200, "asvd": (data.t() @ data / 200).diagonal().diag()}
    metric = moment[basis].double() + (0 if basis == "svd" else 1e-3) * torch.eye(6)
    close(rows @ metric @ rows.t(), torch.eye(4).double(), 1e-9, "the rows are orthonormal for inputs of this moment")
    close(u.t() @ u, torch.eye(4).double(), 1e-9, "U")
    close(u.t() @ weight, s[:, None] * rows, 1e-9, "a part of W")
    if basis == "svd":
        _, s_all, vh = torch.linalg.svd(weight)
        scores = s_all * (data @ vh.t()).square().mean(0).sqrt()
        close(s, s_all[scores.topk(4).indices.sort().values], 1e-9, "the directions of the largest outputs")
    g = torch.tensor([0.7, -2.0, -0.3, 1.5]).double()
    for coefficient in (1.0, 0.0, -0.5):
        values = {"0.lora_g": g, "lora_shared_coefficient": torch.tensor(coefficient).double()}
        llfx.load_adapter_state_dict(gm, {**p, **values})
        gains = 1 + F.elu(coefficient * (g.clamp(max=0) if suppress else g))
        rest = weight - u * s @ rows
        expected = x @ (rest + u * (s * gains) @ rows).t() + bias
        close(gm(x), expected, 1e-9, f"steered by {coefficient}")


def orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt, written out."""
    done: list[Tensor] = []
    for column in columns.t():
        rest = column - sum((column @ other) * other for other in done)
        done.append(rest / rest.norm())
    return torch.stack(done, 1)


Core = Callable[[float, Tensor, dict[str, Tensor]], Tensor]


def arrow(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    core: Tensor = torch.block_diag(c * p["lora_M"], F.elu(c * p["lora_g"]).diag())
    return core * s


def arrow_of_all(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    return c * p["lora_M"] @ s.diag()


def suppressing_arrow(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    return arrow(c, s, {**p, "lora_g": p["lora_g"].clamp(max=0)})


def dplr(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    gains: Tensor = s * F.elu(c * p["lora_g"])
    return gains.diag() + c * p["lora_B"] @ p["lora_A"]


def suppressing_dplr(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    return dplr(c, s, {**p, "lora_g": p["lora_g"].clamp(max=0)})


def ablate(c: float, s: Tensor, p: dict[str, Tensor]) -> Tensor:
    q = orthonormal(p["lora_q"])
    return -c * q @ p["lora_alpha"].clamp(0, 1).diag() @ q.t() @ s.diag()


CORES: dict[str, tuple[Any, Core]] = {
    "arrow": (functools.partial(llfx.AntiPaSTOArrow, r=R, block_size=2), arrow),
    "arrow of all": (functools.partial(llfx.AntiPaSTOArrow, block_size=7), arrow_of_all),
    "arrow that suppresses": (
        functools.partial(llfx.AntiPaSTOArrow, r=R, block_size=1, suppress_only=True),
        suppressing_arrow,
    ),
    "dplr": (functools.partial(llfx.AntiPaSTODPLR, r=R, core_r=3), dplr),
    "dplr of all": (llfx.AntiPaSTODPLR, dplr),
    "dplr that suppresses": (functools.partial(llfx.AntiPaSTODPLR, r=R, suppress_only=True), suppressing_dplr),
    "ablation": (functools.partial(llfx.AntiPaSTOAblate, r=R), ablate),
    "ablation of several": (functools.partial(llfx.AntiPaSTOAblate, r=R, directions=3), ablate),
    "ablation of all": (functools.partial(llfx.AntiPaSTOAblate, r=R, directions=9), ablate),
}


@pytest.mark.parametrize("basis", broad_after(1, ["svd", "corda"]))
@pytest.mark.parametrize("what", broad_after(4, CORES))
def test_cores_change_what_the_weight_does_in_its_directions(what: str, basis: str) -> None:
    make, core = CORES[what]
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(6, 8)).double()
    data, x = torch.randn(50, 6).double() @ torch.randn(6, 6).double(), torch.randn(4, 6).double()
    gm = llfx.rewrite(net, make(basis=basis, target_names="0"), calibration=[(data,)])
    state = llfx.adapter_state_dict(gm)
    trained = {name for name, parameter in gm.named_parameters() if parameter.requires_grad}
    values = {name: torch.randn(state[name].shape).double() for name in trained}
    values |= {name: torch.rand(value.shape).double() * 3 - 1 for name, value in values.items() if "alpha" in name}
    p = {name.removeprefix("0."): value for name, value in {**state, **values}.items()}
    u, s, rows = p["lora_U"], p["lora_S"], p["lora_P"]
    close((u * s) @ rows @ torch.linalg.pinv(rows) @ rows, (u * s) @ rows, 1e-9, "a part of W")
    for c in (1.0, 0.0, -0.5):
        values["lora_shared_coefficient"] = torch.tensor(c).double()
        llfx.load_adapter_state_dict(gm, {**state, **values})
        weight = net[0].weight + u @ core(c, s, p) @ rows
        close(gm(x), x @ weight.t() + net[0].bias, 1e-9, f"steered by {c}")
        assert torch.equal(gm(x), net(x)) == (c == 0)


@pytest.mark.parametrize("cls", [llfx.AntiPaSTOArrow, llfx.AntiPaSTODPLR])
def test_cores_start_as_the_identity(cls: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 8)).double()
    x = torch.randn(4, 6).double()
    assert torch.equal(llfx.rewrite(net, cls(r=4, target_names="0"))(x), net(x))


def test_an_ablation_of_full_strength_takes_away_a_direction_of_the_output() -> None:
    net: Any = nn.Sequential(nn.Linear(6, 8, bias=False)).double()
    gm = llfx.rewrite(net, llfx.AntiPaSTOAblate(strength=1, target_names="0"))  # all 6 directions of W
    p = llfx.adapter_state_dict(gm)
    taken = p["0.lora_U"] @ p["0.lora_q"][:, 0]
    x = torch.randn(4, 6).double()
    assert (net(x) @ taken).abs().max() > 0.1
    assert (gm(x) @ taken).abs().max() < 1e-9
    assert gm(x).norm() < net(x).norm(), "nothing is amplified"


@pytest.mark.parametrize("strength", [0, 1.5])
def test_an_ablation_without_gradient_or_beyond_all_is_refused(strength: float) -> None:
    with pytest.raises(llfx.ConfigError, match="strength is above 0"):
        llfx.AntiPaSTOAblate(strength=strength)


def test_a_basis_from_data_needs_data() -> None:
    with pytest.raises(llfx.ConfigError, match="comes from data: give calibration"):
        llfx.rewrite(nn.Sequential(nn.Linear(6, 8)), llfx.AntiPaSTOGain(basis="corda", target_names="0"))
