"""Ranks and alphas by pattern, and several adapters of different variants on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import randomise

F64 = torch.float64


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=F64)


def ranks(gm: nn.Module) -> dict[str, int]:
    state = llfx.adapter_state_dict(gm)
    return {name.split(".")[0]: tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A")}


def test_the_first_pattern_that_matches_sets_the_rank_of_a_site() -> None:
    cfg = llfx.LoRA(r=2, target_names=(".",), rank_pattern={"^2$": 3, "[24]": 4})
    assert ranks(llfx.rewrite(model(), cfg)) == {"0": 2, "2": 3, "4": 4}


def test_the_scale_uses_the_rank_and_alpha_of_the_pattern() -> None:
    net = model()
    cfg = llfx.LoRA(r=2, alpha=2.0, target_names=("0", "2"), rank_pattern={"2": 4}, alpha_pattern={"0": 10.0})
    gm = llfx.rewrite(net, cfg)
    randomise(gm, 0)
    weights = []
    for name, scale in (("0", 10.0 / 2), ("2", 2.0 / 4)):
        a, b = (gm.get_parameter(f"{name}.lora_{factor}") for factor in "AB")
        weights.append(net.get_submodule(name).weight + scale * b @ a)
    hidden = torch.tanh(F.linear(x(), weights[0], net[0].bias))
    assert torch.allclose(gm(x()), net[4](torch.tanh(F.linear(hidden, weights[1], net[2].bias))), atol=1e-12)


def test_pairs_and_a_mapping_mean_the_same_and_survive_a_file(tmp_path: Path) -> None:
    pairs, mapping = (
        llfx.LoRA(r=2, target_names=(".",), rank_pattern=pattern, alpha_pattern={"0": 3.0})
        for pattern in ((("2", 4), ("4", 1)), {"2": 4, "4": 1})
    )
    assert pairs == mapping
    gm = llfx.rewrite(model(), mapping)
    randomise(gm, 1)
    llfx.save(gm, tmp_path / "adapter")
    loaded = llfx.load(model(), tmp_path / "adapter")
    assert ranks(loaded) == {"0": 2, "2": 4, "4": 1}
    assert torch.equal(loaded(x()), gm(x()))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_site_is_an_error(field: str) -> None:
    fields: dict[str, Any] = {field: {"q_proj": 4}}
    cfg = llfx.LoRA(r=2, target_names=("0",), **fields)
    with pytest.raises(llfx.SelectionError, match=rf"'q_proj' in {field} matches none"):
        llfx.rewrite(model(), cfg)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"0": 0}),
        ("rank_pattern", {"0": 1.5}),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {3: 2}),
        ("rank_pattern", 4),
        ("rank_pattern", "q_proj"),
        ("alpha_pattern", {"0": float("nan")}),
        ("alpha_pattern", [("0",)]),
    ],
)
def test_an_impossible_pattern_is_a_config_error(field: str, value: Any) -> None:
    with pytest.raises(llfx.ConfigError):
        llfx.LoRA(**{field: value})


def test_a_rank_that_is_too_large_for_one_site_is_refused_with_its_name() -> None:
    with pytest.raises(llfx.ConfigError, match=r"r=7 is larger than site '4' allows"):
        llfx.rewrite(model(), llfx.LoRA(r=2, target_names=(".",), rank_pattern={"4": 7}))


# Several adapters at one site, in order.


def gate_then_low_rank(first: llfx.Variant, second: llfx.Variant) -> tuple[Tensor, nn.Module]:
    gm = llfx.rewrite(model(), [first, second])
    randomise(gm, 2)
    return gm(x()), gm


def test_adapters_are_nested_in_order_and_the_first_is_innermost() -> None:
    net = model()
    gate, low_rank = llfx.IA3(target_names=("0",)), llfx.LoRA(r=2, alpha=2.0, target_names=("0",))
    for cfgs in ((gate, low_rank), (low_rank, gate)):
        y, gm = gate_then_low_rank(*cfgs)
        state = llfx.adapter_state_dict(gm)
        suffixes = {type(cfg): "" if i == 0 else "_2" for i, cfg in enumerate(cfgs)}
        g = state[f"0.lora_g{suffixes[llfx.IA3]}"]
        a, b = (state[f"0.lora_{factor}{suffixes[llfx.LoRA]}"] for factor in "AB")
        plain, branch = net[0](x()), x() @ a.t() @ b.t()
        expected = plain * g + branch if cfgs[0] is gate else (plain + branch) * g
        assert torch.allclose(y, net[4](torch.tanh(net[2](torch.tanh(expected)))), atol=1e-12)
        assert llfx.inspect(gm)[0].adapters == tuple(type(cfg).__name__ for cfg in cfgs)


def test_a_site_may_have_several_adapters_of_one_variant() -> None:
    cfg = llfx.LoRA(r=2, alpha=2.0, target_names=("0",))
    y, gm = gate_then_low_rank(cfg, cfg)
    state = llfx.adapter_state_dict(gm)
    net = model()
    weight = net[0].weight + sum(state[f"0.lora_B{n}"] @ state[f"0.lora_A{n}"] for n in ("", "_2"))
    expected = net[4](torch.tanh(net[2](torch.tanh(F.linear(x(), weight, net[0].bias)))))
    assert torch.allclose(y, expected, atol=1e-12)
    assert len(llfx.adapter_parameters(gm)) == 4
