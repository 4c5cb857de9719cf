"""PEFT's configs: which modules they mean, what they are here, what is refused; and what the files hold beyond that."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.adapters.placement import by_config
from tests.support.conformance import randomise
from tests.support.peft_models import CASES, captured
from tests.support.releases import since
from tests.support.selection import broad_after
from tests.support.untouched import untouched

CASE = CASES["llama"]
NAMES = ["q_proj", "down_proj"]


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**CASE.inputs((3, 6))).logits
        return logits


def ranks(model: Any) -> dict[str, tuple[int, float]]:
    local: dict[str, Any] = {p.site: p.local for _, placed in by_config(model) for p in placed}
    return {site: (config.r, config.alpha) for site, config in local.items()}


TARGETS: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": NAMES},
    "a list of longer endings": {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "a regular expression": {"target_modules": r".*\.(0\.self_attn\.[qk]|1\.mlp\.up)_proj"},
    "exclusions": {"target_modules": NAMES, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "an excluded expression": {"target_modules": NAMES, "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": NAMES, "layers_to_transform": [1]},
    "one layer": {"target_modules": NAMES, "layers_to_transform": 0},
    "layers of a stack": {"target_modules": NAMES, "layers_to_transform": [0], "layers_pattern": "layers"},
    "ranks": {"target_modules": NAMES, "rank_pattern": {"q_proj": 2, r".*0\.mlp\.down_proj": 3}},
    "alphas": {"target_modules": NAMES, "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5}},
}


@pytest.mark.parametrize("what", broad_after(2, TARGETS))
def test_a_config_means_the_modules_and_ranks_that_it_means_in_peft(what: str, tmp_path: Path) -> None:
    model, graph = captured("llama")
    config = peft.LoraConfig(r=4, lora_alpha=6, **TARGETS[what])
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    ours = llfx.rewrite(graph, llfx.from_peft_config(config))
    scales = {
        name: (module.r["default"], module.scaling["default"] * module.r["default"])
        for name, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert ranks(ours) == scales
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path))
    loaded = llfx.load_peft(graph, tmp_path)
    assert ranks(loaded) == scales
    assert torch.allclose(output(loaded), output(theirs), atol=1e-4)


def test_rewrite_wrap_adapt_and_add_take_configs_of_peft_as_they_are() -> None:
    model, graph = captured("llama")
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES)
    ours = llfx.from_peft_config(theirs)
    spec: dict[str, Any] = {
        "fr": theirs,
        "de": [peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), llfx.HRA(r=2)],
    }
    for adapt in (llfx.rewrite, llfx.wrap):
        assert ranks(adapt(graph, theirs)) == ranks(adapt(graph, ours))
    adapted = llfx.adapt(model, spec)
    assert [row.name for row in llfx.adapters(adapted)] == ["fr", "de", "de"]
    llfx.add(adapted, {"it": peft.LoraConfig(r=3, target_modules=["o_proj"], modules_to_save=["lm_head"])})
    labels = [row.label.partition("(")[0] for row in llfx.adapters(adapted)]
    assert labels == ["LoRA", "IA3", "HRA", "Full", "LoRA"]


def test_a_loaded_adapter_trains_unless_it_is_told_not_to(tmp_path: Path) -> None:
    _, graph = captured("llama")
    gm = llfx.rewrite(graph, llfx.LoRA(r=2))
    llfx.save_peft(gm, tmp_path)
    assert len(llfx.adapter_parameters(llfx.load_peft(graph, tmp_path))) == len(llfx.adapter_parameters(gm))
    both = llfx.load_peft(gm, tmp_path, name="it", is_trainable=False)
    assert not any(name.endswith("_it") for name, each in both.named_parameters() if each.requires_grad)
    assert len(llfx.adapter_parameters(both)) == len(llfx.adapter_parameters(gm))
    assert llfx.adapter_parameters(llfx.load_peft(graph, tmp_path, is_trainable=False)) == []


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_targets_that_depend_on_the_model_are_those_of_the_model_to_adapt(targets: str | None) -> None:
    model, graph = captured("llama")
    config = peft.LoraConfig(r=4, target_modules=targets)
    expected = ranks(llfx.rewrite(graph, llfx.from_peft_config(config, model)))
    assert expected
    for adapted in (llfx.rewrite(model, config), llfx.rewrite(graph, config), llfx.adapt(model, config)):
        assert ranks(adapted) == expected
    with pytest.raises(llfx.ConfigError, match=r"write from_peft_config\(config, model\)"):
        llfx.backend(config)


@pytest.mark.parametrize("what", broad_after(4, TARGETS))
def test_what_we_write_means_the_same_modules_and_ranks_in_peft(what: str, tmp_path: Path) -> None:
    model, graph = captured("llama")
    ours = llfx.rewrite(graph, llfx.from_peft_config(peft.LoraConfig(r=4, lora_alpha=6, **TARGETS[what])))
    randomise(ours, 3)
    llfx.save_peft(ours, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).double().eval()
    assert set(theirs.base_model.targeted_module_names) == ranks(ours).keys()
    assert torch.allclose(output(theirs), output(ours), atol=1e-4)


@pytest.mark.parametrize(
    "feedforward",
    broad_after(2, [["down_proj"], r".*\.down_proj", [], ["q_proj", "down_proj"]]),
    ids=["list", "pattern", "none", "all"],
)
def test_ia3_gates_the_side_that_feedforward_modules_says(feedforward: Any, tmp_path: Path) -> None:
    model, graph = captured("llama")
    target = r".*\.(q_proj|down_proj)" if isinstance(feedforward, str) else NAMES
    config = peft.IA3Config(target_modules=target, feedforward_modules=feedforward)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = llfx.load_peft(graph, tmp_path / "theirs")
    assert torch.allclose(output(loaded), output(theirs), atol=1e-6)
    llfx.save_peft(loaded, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").double().eval()
    assert torch.allclose(output(back), output(theirs), atol=1e-6)


def test_what_is_written_is_a_config_that_peft_accepts_and_that_comes_back() -> None:
    _, graph = captured("llama")
    cfg = llfx.LoRA(r=4, alpha=3.0, dropout=0.1, rank_stabilized=True, target_roles=("query", "down"))
    written = llfx.to_peft_config(llfx.rewrite(graph, cfg))
    assert written["target_modules"] == ["down_proj", "q_proj"]
    config: Any = peft.get_peft_config(dict(written))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 3.0, 0.1, True)
    back: Any = llfx.from_peft_config(config)
    assert (back.r, back.alpha, back.dropout, back.rank_stabilized) == (4, 3.0, 0.1, True)
    json.dumps(written)


def test_modules_that_share_their_last_name_with_others_are_named_in_full() -> None:
    _, graph = captured("llama")
    gm = llfx.rewrite(graph, llfx.LoRA(r=2, target_names=(r"layers\.0\..*q_proj",)))
    assert llfx.to_peft_config(gm)["target_modules"] == r"model\.layers\.0\.self_attn\.q_proj"


# Forms that only a file of weights shows.


@pytest.mark.parametrize("cls", broad_after(1, [llfx.PiSSA, llfx.OLoRA]))
@pytest.mark.parametrize("stabilized", [False, True])
def test_pissa_and_olora_as_a_lora_of_twice_the_rank_run_on_the_unchanged_base(
    cls: Any, stabilized: bool, tmp_path: Path
) -> None:
    model, graph = captured("llama")
    cfg = cls(r=2, alpha=3.0, rank_stabilized=stabilized, target_names=NAMES, rank_pattern={"q_proj": 3})
    gm = llfx.rewrite(graph, cfg)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.add_(0.1 * torch.randn_like(parameter))
    llfx.save_peft(gm, tmp_path, as_lora=True)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).double().eval()
    assert theirs.peft_config["default"].init_lora_weights is True
    assert torch.allclose(output(theirs), output(gm), atol=1e-4)
    assert not torch.allclose(output(gm), output(graph), atol=1e-2)
    loaded = llfx.load_peft(graph, tmp_path)
    assert {type(variant) for variant, _ in by_config(loaded)} == {llfx.LoRA}
    assert torch.allclose(output(loaded), output(gm), atol=1e-9)


def test_lora_xs_is_written_as_the_lora_that_it_is(tmp_path: Path) -> None:
    model, graph = captured("llama")
    cfg = llfx.LoRAXS(r=30, alpha=3.0, target_names=NAMES, rank_pattern={"q_proj": 3})  # 30 is above all sides
    gm = llfx.rewrite(graph, cfg)
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.copy_(torch.randn_like(parameter))
    llfx.save_peft(gm, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).double().eval()
    assert torch.allclose(output(theirs), output(gm), atol=1e-9)
    assert not torch.allclose(output(gm), output(graph), atol=1e-2)
    with pytest.raises(llfx.ConfigError, match="PEFT has no LoRAXS"):
        llfx.save_peft(gm, tmp_path, as_lora=False)


def test_as_lora_is_refused_where_the_change_is_not_of_low_rank(tmp_path: Path) -> None:
    _, graph = captured("llama")
    gm = llfx.rewrite(graph, llfx.IA3(target_names=("v_proj",)))
    randomise(gm, 1)
    with pytest.raises(llfx.ConfigError, match=r"an approximation, lora, errors = llfx\.to_lora"):
        llfx.save_peft(gm, tmp_path, as_lora=True)
    assert not list(tmp_path.iterdir())


@since("peft", "0.21", "VeRA is made beside torchao 0.18")
def test_projections_that_a_file_leaves_out_are_drawn_from_its_seed(tmp_path: Path) -> None:
    model, graph = captured("llama")
    config = peft.VeraConfig(r=4, projection_prng_key=5, save_projection=False, target_modules=NAMES)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path))
    assert not any("vera_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.allclose(output(llfx.load_peft(graph, tmp_path)), output(theirs.double()), atol=1e-5)


# What cannot be represented.

REFUSED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": "lm_head"},
    "bias": {"bias": "some"},
    "trainable_token_indices": {"trainable_token_indices": ["new"]},
    "use_qalora": {"use_qalora": True},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "target_parameters": {"target_parameters": [1]},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
    "use_dora": {"init_lora_weights": "pissa", "use_dora": True},
    "target_modules": {"target_modules": "all-linear"},
    "peft_type": {"peft_type": "PREFIX_TUNING"},
    "r": {"r": "four"},
    "lora_dropout": {"lora_dropout": 2.0},
    "rank_pattern": {"rank_pattern": [1]},
    "layers_to_transform": {"layers_to_transform": "1"},
    "exclude_modules": {"exclude_modules": [1]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(field: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": NAMES, **REFUSED[field]}
    said = {"init_lora_weights": "pissa_niter_4", "peft_type": "PREFIX_TUNING", "lora_dropout": "dropout"}
    with pytest.raises(llfx.ConfigError, match=said.get(field, field)):
        llfx.from_peft_config(config)
    write(tmp_path, config, {"base_model.model.x.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(llfx.CheckpointError):
        llfx.load_peft(captured("llama")[1], tmp_path)


def test_adapters_that_peft_cannot_hold_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    _, graph = captured("llama")
    for cfg, part in (
        ([llfx.LoRA(r=2), llfx.IA3()], "holds one config"),
        (llfx.AntiPaSTO(r=4), "PEFT has no method"),
        (llfx.HRA(r=2, rank_pattern={"q_proj": 4}), "one r for all sites"),
    ):
        with pytest.raises(llfx.ConfigError, match=part):
            llfx.save_peft(llfx.rewrite(graph, cfg), tmp_path)
    assert not list(tmp_path.iterdir())


# Damaged directories.


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
SITE = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {f"{SITE}.lora_A.weight": torch.ones(4, 16), f"{SITE}.lora_B.weight": torch.ones(16, 4)}
DAMAGED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "a tensor less": (GOOD, {f"{SITE}.lora_A.weight": torch.ones(4, 16)}, "lacks lora_B"),
    "an unknown tensor": (GOOD, {**TENSORS, f"{SITE}.lora_embedding_A": torch.ones(1)}, "lora_embedding_A"),
    "a tensor that the config rules out": (GOOD, {**TENSORS, f"{SITE}.lora_B.bias": torch.ones(16)}, "lora_bias"),
    "another module": (GOOD, {k.replace("q_proj", "z_proj"): v for k, v in TENSORS.items()}, "the model does not have"),
    "another shape": ({**GOOD, "r": 3}, TENSORS, "shape"),
    "no tensor": (GOOD, {}, "holds no adapter"),
    "too large a rank": ({**GOOD, "r": 400}, TENSORS, r"\(400, 16\)"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_directory_is_a_checkpoint_error_and_changes_nothing(what: str, tmp_path: Path) -> None:
    config, tensors, part = DAMAGED[what]
    write(tmp_path, config, tensors)
    model, graph = captured("llama")
    with untouched(model, graph), pytest.raises(llfx.CheckpointError, match=part):
        llfx.load_peft(graph, tmp_path)


def test_a_directory_without_its_files_or_with_a_pickle_is_refused(tmp_path: Path) -> None:
    _, graph = captured("llama")
    with pytest.raises(llfx.CheckpointError, match=r"adapter_config\.json"):
        llfx.load_peft(graph, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    with pytest.raises(llfx.CheckpointError, match="safetensors"):
        llfx.load_peft(graph, tmp_path)
