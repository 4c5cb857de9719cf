"""Files for ONNX Runtime, which runs them: adapters as optional inputs, and what it takes as constants alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite_fx as llfx
from lora_lite_fx.adapters import registry
from lora_lite_fx.hand_over import onnx_file
from lora_lite_fx.testing.comparisons import perturb
from tests.hand_over.test_foldable_options import Squared
from tests.support.conformance import close
from tests.support.onnx_models import Session, Small, adapted, config, ids
from tests.support.selection import broad_unless

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BAKED = {
    "AntiPaSTO", "AntiPaSTOAblate", "BOFT", "FourierFT", "HRA", "PSOFT", "SHiRA", "TrainableTokens", "WaveFT",
}  # fmt: skip
X = ids(3, 5)


def expected(gm: Any, **inputs: Any) -> torch.Tensor:
    result: torch.Tensor = gm(ids=X, **inputs).detach()
    return result


def check_swaps(name: str, folder: Path) -> None:
    """Check two adapters and none in one file, against torch."""
    model, gm = adapted(config(name))
    llfx.save_onnx(gm, folder / "m.onnx")
    session = Session(folder / "m.onnx")
    frozen = model(X).detach()
    for seed in (1, 2):
        perturb(gm, seed)
        llfx.save_onnx_adapter(gm, folder / f"{seed}.onnx_adapter")
        assert (expected(gm) - frozen).abs().max() > 1e-2
        close(session(folder / f"{seed}.onnx_adapter", ids=X)[0], expected(gm), 1e-5, f"adapter {seed}")
        close(session(ids=X)[0], frozen, 1e-6, "none")


@pytest.mark.parametrize("name", broad_unless("LoRA".__eq__, sorted(set(llfx.registry()) - BAKED - {"C3A"})))
def test_adapters_swap(name: str, tmp_path: Path) -> None:
    check_swaps(name, tmp_path)


@pytest.mark.broad
def test_a_class_does_not_inherit_where_its_scale_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(llfx.registry()))
    llfx.register(Squared)
    model, gm = adapted(Squared(r=4, alpha=6, target_names=("up", "down_proj")))
    perturb(gm, 1)
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    llfx.save_onnx_adapter(gm, tmp_path / "1.onnx_adapter")
    session = Session(tmp_path / "m.onnx")
    close(session(tmp_path / "1.onnx_adapter", ids=X)[0], expected(gm), 1e-5, "adapter")
    close(session(ids=X)[0], model(X).detach(), 1e-6, "none")


@pytest.mark.broad
@pytest.mark.parametrize("name", sorted(BAKED))
def test_what_needs_it_is_constants_of_the_file(name: str, tmp_path: Path) -> None:
    _, gm = adapted(config(name))
    path = tmp_path / "m.onnx"
    with pytest.raises(llfx.AdapterError, match=f"{name}.* at .*bake=True"):
        llfx.save_onnx(gm, path, bake=False)
    with pytest.raises(llfx.AdapterError, match=f"{name}.* is constants of the file .* because ONNX.* way out"):
        llfx.save_onnx_adapter(gm, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    llfx.save_onnx(gm, path)
    session = Session(path)
    close(session(ids=X)[0], expected(gm), 1e-5, "baked")
    assert list(session.inputs) == ["ids"]


@pytest.mark.broad
def test_what_onnx_lacks_for_the_inputs_is_refused(tmp_path: Path) -> None:
    _, gm = adapted(config("C3A"))
    with pytest.raises(llfx.AdapterError, match=r"'up' applies aten::fft_rfft .*to_lora"):
        llfx.save_onnx(gm, tmp_path / "m.onnx")
    llfx.save_onnx(llfx.to_lora(gm)[0], tmp_path / "m.onnx", bake=True)
    close(Session(tmp_path / "m.onnx")(ids=X)[0], expected(gm), 1e-5, "to_lora")


@pytest.mark.broad
def test_an_adapter_of_another_alpha_and_rank_runs_at_its_own_strength(tmp_path: Path) -> None:
    model, gm = adapted(llfx.LoRA(r=8, alpha=3.0, rank_pattern={"down": 4}, target_names=("up", "down_proj")))
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    others = [
        llfx.LoRA(r=3, alpha=7.0, target_names=("up", "down_proj")),
        llfx.LoRA(r=5, alpha=2.0, rank_stabilized=True, target_names=("up", "down_proj")),
        llfx.LoRA(r=8, alpha=2.0, rank_pattern={"up": 2}, alpha_pattern={"up": 9.0}, target_names=("up", "down_proj")),
        llfx.LoRA(r=1, alpha=2.0, target_names="up"),
    ]
    for index, cfg in enumerate(others):
        _, other = adapted(cfg, 2 + index, model)
        llfx.scaled(other, {"default": 0.3})
        llfx.save_onnx_adapter(other, tmp_path / f"{index}")
        close(session(tmp_path / f"{index}", ids=X)[0], expected(other), 1e-5, str(cfg))


@pytest.mark.broad
def test_a_rank_that_the_program_computes_with_is_not_open(tmp_path: Path) -> None:
    model, gm = adapted(config("DeLoRA"))
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    llfx.save_onnx_adapter(adapted(config("DeLoRA", r=2), 2, model)[1], tmp_path / "a")
    with pytest.raises(Exception, match=r"Invalid input name|invalid dimensions"):
        Session(tmp_path / "m.onnx")(tmp_path / "a", ids=X)


@pytest.mark.broad
def test_a_coefficient_goes_into_what_is_added(tmp_path: Path) -> None:
    model, gm = adapted(config("LoHa"))
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    other = adapted(config("LoHa", r=2, alpha=5.0), 2, model)[1]
    llfx.scaled(other, {"default": 0.3})
    llfx.save_onnx_adapter(other, tmp_path / "a")
    close(Session(tmp_path / "m.onnx")(tmp_path / "a", ids=X)[0], expected(other), 1e-5, "another rank and scale")


@pytest.mark.broad
def test_adapters_of_one_model_swap_whatever_their_names(tmp_path: Path) -> None:
    model, gm = adapted([llfx.LoRA(r=4, target_names="up"), llfx.IA3(target_names="down_proj")])
    llfx.add(gm, {"fr": [llfx.LoRA(r=2, target_names="up"), llfx.IA3(target_names="down_proj")]})
    perturb(gm, 5)
    llfx.active(gm, "default")
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for name in ("default", "fr"):
        llfx.active(gm, name)
        llfx.save_onnx_adapter(gm, tmp_path / name)
        close(session(tmp_path / name, ids=X)[0], expected(gm), 1e-5, name)
    llfx.active(gm, ["default", "fr"])
    llfx.save_onnx(gm, tmp_path / "both.onnx")
    llfx.save_onnx_adapter(gm, tmp_path / "both")
    both = Session(tmp_path / "both.onnx")
    close(both(tmp_path / "both", ids=X)[0], expected(gm), 1e-5, "both")
    close(both(ids=X)[0], model(X), 1e-6, "none")
    llfx.active(gm, [])
    llfx.save_onnx(gm, tmp_path / "none.onnx")
    assert list(Session(tmp_path / "none.onnx").inputs) == ["ids"]
    with pytest.raises(llfx.AdapterError, match="No adapter acts"):
        llfx.save_onnx_adapter(gm, tmp_path / "none")


@pytest.mark.broad
def test_onnx_runtime_refuses_an_adapter_of_another_variant_or_form(tmp_path: Path) -> None:
    model, gm = adapted(config("DoRA"))
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for cfg in (
        config("LoRA"),
        config(
            "DoRA", alpha_pattern={"up": 1.0}, target_names=("up", "embedding"), target_kinds=("linear", "embedding")
        ),
    ):
        _, other = adapted(cfg, 2, model)
        llfx.save_onnx_adapter(other, tmp_path / "a")
        with pytest.raises(Exception, match=r"Invalid input name|INVALID_ARGUMENT"):
            session(tmp_path / "a", ids=X)
    _, other = adapted(config("DoRA", r=2, alpha=3.0), 2, model)
    llfx.save_onnx_adapter(other, tmp_path / "a")
    close(session(tmp_path / "a", ids=X)[0], expected(other), 1e-5, "another rank")
    llfx.scaled(other, {"default": 0.5})
    with pytest.raises(llfx.AdapterError, match=r"DoRA at 'up' has the coefficient 0.5 .*bake=True"):
        llfx.save_onnx_adapter(other, tmp_path / "b")
    llfx.save_onnx(other, tmp_path / "baked.onnx", bake=True)
    close(Session(tmp_path / "baked.onnx")(ids=X)[0], expected(other), 1e-5, "a coefficient that is baked")


@pytest.mark.broad
def test_a_bank_has_its_slots_in_the_file(tmp_path: Path) -> None:
    _, gm = adapted(llfx.Bank(config("LoRA"), 3))
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    slots = torch.tensor([2, -1, 0])
    with pytest.raises(Exception, match="adapter_ids"):
        session(ids=X)
    close(session(ids=X, adapter_ids=slots)[0], expected(gm, adapter_ids=slots), 1e-5, "slots of the file")
    perturb(gm, 7)
    llfx.save_onnx_adapter(gm, tmp_path / "bank")
    close(session(tmp_path / "bank", ids=X, adapter_ids=slots)[0], expected(gm, adapter_ids=slots), 1e-5, "others")
    with pytest.raises(Exception, match=r"(?i)out of|bounds"):
        session(ids=X, adapter_ids=torch.tensor([3, 0, 0]))


@pytest.mark.broad
def test_a_large_model_has_its_tensors_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_ONE_FILE", 0)
    _, gm = adapted(config("LoRA"))
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    llfx.save_onnx(gm, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    llfx.save_onnx_adapter(gm, tmp_path / "a")
    close(Session(path)(tmp_path / "a", ids=X)[0], expected(gm), 1e-5, "tensors beside the file")
    with pytest.raises(llfx.CheckpointError, match="could not be written"):
        llfx.save_onnx(gm, tmp_path / "missing" / "m.onnx")


@pytest.mark.broad
def test_merged_models_and_models_without_adapters(tmp_path: Path) -> None:
    _, gm = adapted(config("LoRA"))
    llfx.save_onnx(llfx.merge(gm), tmp_path / "m.onnx", {"ids": ids(1, 3)})
    close(Session(tmp_path / "m.onnx")(ids=X)[0], expected(gm), 1e-5, "merged")
    with pytest.raises(llfx.AdapterError, match="no adapters"):
        llfx.save_onnx_adapter(Small(), tmp_path / "a")


@pytest.mark.parametrize(("function", "package"), [("save_onnx", "onnx_ir"), ("save_onnx_adapter", "onnxruntime")])
def test_a_missing_package_names_the_extra(
    function: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gm = adapted(config("LoRA"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} .*: pip install 'lora_lite_fx\[onnx\]'"):
        getattr(llfx, function)(gm, tmp_path / "m")
    assert not list(tmp_path.iterdir())
