"""lora-lite's files, both ways: built here by hand from its format, computed by formulas of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.selection import broad_after
from tests.support.untouched import untouched

D_IN, D_OUT, R, ALPHA = 12, 8, 4, 6.0


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, 5))


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"lora_{name}": 0.5 * torch.randn(shape) + 0.1 for name, shape in shapes.items()}


def lora(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x, w + ALPHA / R * p["lora_B"] @ p["lora_A"], b)


def lora_xs(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x, w + ALPHA / R * p["lora_B"] @ p["lora_R"] @ p["lora_A"], b)


def pissa(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(w)
    residual = w - u[:, :R] @ s[:R].diag() @ vh[:R]
    return F.linear(x, residual + ALPHA / R * p["lora_B"] @ p["lora_A"], b)


def dora(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    v = w + ALPHA / R * p["lora_B"] @ p["lora_A"]
    return F.linear(x, p["lora_m"][:, None] * v / v.norm(dim=1, keepdim=True), b)


def delora(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    a, c = p["lora_A"], p["lora_B"]
    xi = p["lora_lambda"] / R / (a.norm(dim=1) * c.norm(dim=0))
    return F.linear(x, w + c @ xi.diag() @ a @ p["lora_wnorm"].diag(), b)


def hra(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    for u in p["lora_U"]:
        w = w @ (torch.eye(D_IN) - 2 * torch.outer(u, u) / (u @ u))
    return F.linear(x, w, b)


def ia3(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x, w, b) * p["lora_g"]


def ia3_ff(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x * p["lora_g"], w, b)


def road(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = F.linear(x, w, b)
    result = y.clone()
    for group in range(D_OUT // 4):
        for j in range(2):
            first, second, pair = 4 * group + j, 4 * group + 2 + j, 2 * group + j
            theta, alpha = p["lora_road_theta"][pair], p["lora_road_alpha"][pair]
            result[:, first] = alpha * (theta.cos() * y[:, first] - theta.sin() * y[:, second])
            result[:, second] = alpha * (theta.sin() * y[:, first] + theta.cos() * y[:, second])
    return result


def antipasto(x: Tensor, w: Tensor, b: Tensor, p: dict[str, Tensor]) -> Tensor:
    u, s, vh = p["lora_U"], p["lora_S"], p["lora_Vh"]
    limit = 2 * math.tan(0.25)
    turned = []
    for block in range(R // 2):
        half = limit * math.tanh(p["lora_rot_T"][block].item() / 2 / limit) / 2
        skew = torch.tensor([[0.0, half], [-half, 0.0]])
        turned.append(torch.linalg.inv(torch.eye(2) - skew) @ (torch.eye(2) + skew) @ vh[2 * block : 2 * block + 2])
    return F.linear(x, w - u @ s.diag() @ vh + u @ (s + p["lora_delta_s"]).diag() @ torch.cat(turned), b)


def triplets() -> dict[str, Tensor]:
    u, s, vh = torch.linalg.svd(base()[0].weight.detach())
    return {"lora_U": u[:, :R].contiguous(), "lora_S": s[:R].clone(), "lora_Vh": vh[:R].contiguous()}


FACTORS = drawn(A=(R, D_IN), B=(D_OUT, R))
PAIRS = D_OUT // 2
Formula = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]
FILES: dict[str, tuple[Formula, dict[str, Tensor], dict[str, Any], type[llfx.Variant]]] = {
    "lora": (lora, FACTORS, {}, llfx.LoRA),
    "eva": (lora, FACTORS, {}, llfx.EVA),
    "lora_xs": (lora_xs, FACTORS | drawn(R=(R, R)), {}, llfx.LoRAXS),
    "pissa": (pissa, FACTORS, {}, llfx.PiSSA),
    "dora": (dora, FACTORS | drawn(m=(D_OUT,)), {}, llfx.DoRA),
    "delora": (delora, FACTORS | drawn(**{"lambda": (), "wnorm": (D_IN,)}), {"lambda0": 15.0}, llfx.DeLoRA),
    "hra": (hra, drawn(U=(R, D_IN)), {}, llfx.HRA),
    "ia3": (ia3, drawn(g=(D_OUT,)), {}, llfx.IA3),
    "ia3_ff": (ia3_ff, drawn(g=(D_IN,)), {}, llfx.IA3),
    "road": (road, drawn(road_theta=(PAIRS,), road_alpha=(PAIRS,)), {"group_size": 4}, llfx.RoAd),
    "antipasto": (
        antipasto,
        triplets() | drawn(delta_s=(R,), rot_T=(R // 2, 1)),
        {"block_size": 2, "max_rotation_angle": 0.5, "rotate_basis": "V"},
        llfx.AntiPaSTO,
    ),
}
FILES["road"][2]["road_variant"] = "road_1"


def config(name: str, **fields: Any) -> str:
    common = {
        "r": R,
        "alpha": ALPHA,
        "dtype": "float32",
        "target_roles": ["reader", "writer"],
        "target_names": [],
        "exclude_names": ["lm_head"],
        "layers": None,
    }
    return json.dumps({"variant": name, **common, **FILES[name][2], **fields})


def write(path: Path, name: str) -> None:
    save_file({f"0.{key}": tensor for key, tensor in FILES[name][1].items()}, path, {"cfg": config(name)})


@pytest.mark.parametrize("name", broad_after(3, FILES))
def test_a_lora_lite_file_computes_what_its_formula_says(name: str, tmp_path: Path) -> None:
    formula, tensors, _, cls = FILES[name]
    write(tmp_path / "adapter", name)
    model, x = base(), torch.randn(7, D_IN)
    with untouched(model):
        gm = llfx.load_lora_lite(model, tmp_path / "adapter")
    expected = model[2](torch.tanh(formula(x, model[0].weight, model[0].bias, tensors)))
    assert torch.allclose(gm(x), expected, atol=1e-5)
    assert [row.adapters for row in llfx.inspect(gm)] == [(cls.__name__,), ()]


@pytest.mark.parametrize("name", broad_after(5, FILES))
def test_what_is_written_is_what_was_read(name: str, tmp_path: Path) -> None:
    write(tmp_path / "first", name)
    llfx.save_lora_lite(llfx.load_lora_lite(base(), tmp_path / "first"), tmp_path / "second")
    with safetensors.safe_open(tmp_path / "second", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        written = json.loads(file.metadata()["cfg"])
    assert tensors.keys() == {f"0.{key}" for key in FILES[name][1]}
    for key, tensor in FILES[name][1].items():
        assert torch.equal(tensors[f"0.{key}"], tensor)
    first = json.loads(config(name))
    targets = {"target_names": ["^0$"], "target_roles": [], "exclude_names": []}
    # A rank or an alpha that the variant has no use for is not kept: the file gets lora-lite's default.
    has = {field.name for field in dataclasses.fields(FILES[name][3])}
    unused = {field: default for field, default in {"r": 8, "alpha": 16.0}.items() if field not in has}
    assert written == {**first, **targets, **unused}


REFUSED: dict[str, tuple[Any, str]] = {
    "several adapters": ([llfx.LoRA(r=2, target_names=("0",)), llfx.IA3(target_names=("0",))], "holds one config"),
    "several ranks": (llfx.LoRA(r=2, target_names=("0", "2"), rank_pattern={"2": 1}), "one rank"),
    "another scale": (llfx.LoRA(r=2, target_names=("0",), rank_stabilized=True), "rank_stabilized"),
    "a bias": (llfx.LoRA(r=2, target_names=("0",), bias=True), "no bias"),
    "gates on both sides": (llfx.IA3(target_names=("0", "2"), feedforward_names=("2",)), "has both"),
    "an unknown variant": (llfx.OLoRA(r=2, target_names=("0",)), "OLoRA"),
}


@pytest.mark.parametrize("what", broad_after(3, REFUSED))
def test_what_a_lora_lite_file_cannot_hold_is_refused(what: str, tmp_path: Path) -> None:
    cfg, part = REFUSED[what]
    with pytest.raises(llfx.ConfigError, match=part):
        llfx.save_lora_lite(llfx.rewrite(base(), cfg), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_calibrated_directions_are_refused_since_lora_lite_takes_others_out_of_the_weight(tmp_path: Path) -> None:
    x = torch.linalg.svd(base()[0].weight.detach())[2][-3:] * 100  # inputs along the smallest directions
    cfg = llfx.AntiPaSTO(r=2, block_size=2, target_names=("0",))
    with pytest.raises(llfx.ConfigError, match="calibration chose others"):
        llfx.save_lora_lite(llfx.rewrite(base(), cfg, calibration=[(x,)]), tmp_path / "adapter")
    llfx.save_lora_lite(llfx.rewrite(base(), cfg), tmp_path / "adapter")


DAMAGE: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "no config": ({"0.lora_A": FACTORS["lora_A"]}, {}, "not written by lora-lite"),
    "no JSON": ({"0.lora_A": FACTORS["lora_A"]}, {"cfg": "{"}, "cannot be read"),
    "a list": ({"0.lora_A": FACTORS["lora_A"]}, {"cfg": "[]"}, "cannot be read"),
    "an unknown variant": ({"0.lora_A": FACTORS["lora_A"]}, {"cfg": '{"variant": "x"}'}, "'x' is not known"),
    "an unknown field": ({"0.lora_A": FACTORS["lora_A"]}, {"cfg": config("lora", odd=1)}, "no field odd"),
    "a missing tensor": ({"0.lora_A": FACTORS["lora_A"]}, {"cfg": config("lora")}, "lacks lora_B"),
    "a foreign tensor": (
        {**{f"0.{k}": v for k, v in FACTORS.items()}, "0.odd": torch.ones(1)},
        {"cfg": config("lora")},
        "odd",
    ),
    "a foreign module": ({f"9.{k}": v for k, v in FACTORS.items()}, {"cfg": config("lora")}, "the model does not have"),
    "another rank": ({f"0.{k}": v for k, v in FACTORS.items()}, {"cfg": config("lora", r=2)}, "shape"),
    "a rank that is no number": ({f"0.{k}": v for k, v in FACTORS.items()}, {"cfg": config("lora", r="4")}, "integer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_file_is_a_checkpoint_error(what: str, tmp_path: Path) -> None:
    tensors, metadata, part = DAMAGE[what]
    save_file(tensors, tmp_path / "adapter", metadata)
    model = base()
    with untouched(model), pytest.raises(llfx.CheckpointError, match=part):
        llfx.load_lora_lite(model, tmp_path / "adapter")
