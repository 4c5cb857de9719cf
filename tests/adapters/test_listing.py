"""The adapters of a model as records and as a table: configs, sites, and the numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters import registry
from tests.support.models import one_layer_llama
from tests.support.own_variants import registered
from tests.support.selection import broad_after

CONFIGS = [llfx.LoRA(r=2, alpha=6.0, rank_pattern={"v_proj": 4}, target_names="[qv]_proj"), llfx.IA3(layers=0)]


def loaded(path: Path) -> nn.Module:
    model = one_layer_llama()
    llfx.save(llfx.rewrite(model, CONFIGS), path / "adapters")
    return llfx.load(model, path / "adapters")


MODELS: dict[str, Callable[[Path], nn.Module]] = {
    "rewrite": lambda _: llfx.rewrite(one_layer_llama(), CONFIGS),
    "wrap": lambda _: llfx.wrap(one_layer_llama(), CONFIGS),
    "adapt": lambda _: llfx.adapt(one_layer_llama(), CONFIGS),
    "load": loaded,
    "backend": lambda _: llfx.backend(CONFIGS).adapt(one_layer_llama(), torch.zeros(1, 3, dtype=torch.long)),
}


@pytest.mark.parametrize("how", broad_after(1, MODELS))
def test_the_configs_and_sites_of_a_model_are_read_back(how: str, tmp_path: Path) -> None:
    model = MODELS[how](tmp_path)
    lora, ia3 = llfx.adapters(model)
    assert (lora.index, lora.variant, lora.config) == (0, "LoRA", CONFIGS[0])
    assert (ia3.index, ia3.variant, ia3.config) == (1, "IA3", CONFIGS[1])
    names = {site.name.rpartition(".")[2]: site for site in lora.sites}
    assert names.keys() == {"q_proj", "v_proj"}
    local: Any = lora.config.for_site(names["v_proj"].name)
    assert (local.r, local.alpha) == (4, 6.0)
    for name, qualified in names["v_proj"].tensors.items():
        assert qualified == f"{names['v_proj'].name}.{name}"
        assert qualified in llfx.adapter_state_dict(model)
    sizes = [sum(p.numel() for p in llfx.adapter_parameters(model) if p.dim() == dim) for dim in (2, 1)]
    assert [row.trainable for row in (lora, ia3)] == [row.parameters for row in (lora, ia3)] == sizes
    assert sum(site.trainable for site in lora.sites) == lora.trainable


def test_the_table_is_readable_and_counts_what_trains_now() -> None:
    net = nn.Sequential(nn.Linear(100, 40), nn.Linear(40, 50))
    gm = llfx.rewrite(net, [llfx.LoRA(r=8, alpha=32, target_names="."), llfx.PiSSA(r=2, target_names="0")])
    gm.get_parameter("1.lora_A").requires_grad_(False)
    assert str(llfx.adapters(gm)).splitlines() == [
        "   adapter               sites  trainable  parameters",
        "-  --------------------  -----  ---------  ----------",
        "0  LoRA(r=8, alpha=32)       2      1,520       1,840",
        "1  PiSSA(r=2, alpha=16)      1        280         560",
    ]
    assert str(llfx.adapters(gm)[0]) == "LoRA(r=8, alpha=32) at 2 sites, 1,520 parameters"
    assert [row.index for row in llfx.adapters(gm)[1:]] == [1]
    assert sum(p.numel() for p in llfx.adapter_parameters(gm)) == 1520 + 280


@dataclass(frozen=True, kw_only=True)
class OneGate(llfx.Variant):
    """One gate, trained, for all sites."""

    def params(self, site: Any) -> dict[str, llfx.ParamSpec]:
        return {"lora_shared_gate": llfx.ParamSpec((6,), init="ones")}

    def forward(self, x: Any, base: Any, p: Any) -> Any:
        return base(x * p.lora_shared_gate)


def test_a_tensor_that_sites_share_counts_once() -> None:
    with registered(OneGate):
        gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), OneGate(target_names="."))
        (row,) = llfx.adapters(gm)
        assert (row.trainable, [site.trainable for site in row.sites]) == (6, [6, 6])
        table = llfx.inspect(gm)
        assert ([site.parameters for site in table], table.trainable) == ([6, 6], 6)
        assert "6 of 90 parameters train" in str(table)


def test_a_model_without_adapters_is_an_error_and_a_variant_of_another_process_has_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(llfx.AdapterError, match="Linear has no adapters; it is not what rewrite"):
        llfx.adapters(nn.Linear(2, 2))
    with pytest.raises(llfx.AdapterError, match="must be what rewrite, wrap, adapt or load returned, not 'a'"):
        llfx.adapters("a")  # type: ignore[arg-type]
    with registered(OneGate):
        gm = llfx.rewrite(nn.Sequential(nn.Linear(6, 6)), OneGate(target_names="0"))
    (row,) = llfx.adapters(gm)
    assert (row.variant, row.fields["target_names"], str(row)) == (
        "OneGate",
        ["0"],
        "OneGate() at 1 site, 6 parameters",
    )
    assert row.config == OneGate(target_names="0"), "the class that it was made with, registered or not"
    monkeypatch.setattr(registry, "_MADE_WITH", {})
    with pytest.raises(llfx.ConfigError, match="Unknown variant 'OneGate'"):
        _ = row.config
