"""Models are saved for ExecuTorch and run in its runtime: one base file, and a program for each adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.support.captured import captured
from tests.support.conformance import calibration, randomise, small
from tests.support.models import GatedMLP, ids, net, one_layer_llama

pytest.importorskip("executorch")

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = {"ids": ids(2, 5)}
SHAPES = ((2, 5), (1, 1), (3, 9))
REFUSED = {"C3A": "C3A at 'blocks.0.gate'.*llfx.merge", "GLoRA": "cannot run the program.*The way out: bake=False"}
"""Variants with an operator that ExecuTorch lacks, also baked, or on which it crashes; and the error."""


def small_net() -> nn.Module:
    return net(GatedMLP)


def adapted(cfg: Any, seed: int = 1) -> Any:
    """Return a graph whose adapters have random values."""
    _, graph = captured(small_net, inputs=(EXAMPLE["ids"],))
    gm = llfx.rewrite(graph, cfg, calibration=calibration(cfg, None, (EXAMPLE["ids"],)))
    randomise(gm, seed)
    return gm


def run(folder: Path, name: str, *inputs: Tensor) -> Any:
    """Return what ExecuTorch computes."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(folder / f"{name}.pte", data_path=folder / "base.ptd")
    return program.load_method("forward").execute([tensor.contiguous() for tensor in inputs])


def check(folder: Path, name: str, gm: Any) -> None:
    """Check that a program computes what a graph does, for sizes other than those of the example too."""
    for shape in SHAPES:
        with torch.no_grad():
            expected = gm(ids(*shape, seed=3))
        (result,) = run(folder, name, ids(*shape, seed=3))
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.broad
def test_adapters_share_one_base(tmp_path: Path) -> None:
    french, english = (adapted(llfx.LoRA(r=2, target_names="gate"), seed) for seed in (1, 2))
    llfx.save_executorch(french, tmp_path, "fr", EXAMPLE)
    base = (tmp_path / "base.ptd").read_bytes()
    llfx.save_executorch(english, tmp_path, "en", EXAMPLE)
    with llfx.active(english, []):
        llfx.save_executorch(english, tmp_path, "none", EXAMPLE)
    check(tmp_path, "fr", french)
    check(tmp_path, "en", english)
    check(tmp_path, "none", llfx.remove(french))
    with torch.no_grad():
        english.get_parameter("blocks.0.up.weight").add_(1e-6)
    with pytest.raises(llfx.AdapterError, match=r"base.ptd .* another base.*another folder"):
        llfx.save_executorch(english, tmp_path, "en_2", EXAMPLE)
    assert {path.name for path in tmp_path.iterdir()} == {"base.ptd", "fr.pte", "en.pte", "none.pte"}
    assert (tmp_path / "base.ptd").read_bytes() == base


@pytest.mark.broad
def test_the_base_is_the_same_whichever_adapter_is_first(tmp_path: Path) -> None:
    models = [adapted(cfg) for cfg in (llfx.IA3(target_names="."), llfx.Full(target_names=".", weight=True))]
    for index, (first, second) in enumerate((models, models[::-1])):
        llfx.save_executorch(first, tmp_path / str(index), "first", EXAMPLE)
        llfx.save_executorch(second, tmp_path / str(index), "second", EXAMPLE)
        check(tmp_path / str(index), "second", second)
    assert (tmp_path / "0" / "base.ptd").read_bytes() == (tmp_path / "1" / "base.ptd").read_bytes()
    with torch.no_grad():
        models[0].get_parameter("embed.weight").add_(1e-6)  # XNNPACK does not read this one
    with pytest.raises(llfx.AdapterError, match=r"base.ptd has other values of embed.weight"):
        llfx.save_executorch(models[0], tmp_path / "0", "first", EXAMPLE)


@pytest.mark.broad
@pytest.mark.parametrize("cls", llfx.registry().values())
def test_each_variant(cls: type[llfx.Variant], tmp_path: Path) -> None:
    gm = adapted(small(cls))
    reason = REFUSED.get(cls.__name__)
    if reason is None:
        llfx.save_executorch(gm, tmp_path, "one", EXAMPLE)
        check(tmp_path, "one", gm)
    else:
        with pytest.raises(llfx.AdapterError, match=reason):
            llfx.save_executorch(gm, tmp_path, "one", EXAMPLE)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.broad
def test_operators_that_are_lacking_are_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(llfx.AdapterError, match=r"triu_indices of OFT at 'blocks.0.gate'.*The way out: bake=True"):
        llfx.save_executorch(adapted(llfx.OFT(block_size=4, target_names=".")), tmp_path, "oft", EXAMPLE, bake=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.broad
def test_baked_graphs_and_merged_ones(tmp_path: Path) -> None:
    gm = adapted(llfx.LoHa(r=2, target_names="."))
    baked = llfx.bake(gm, whole_updates=True)
    with pytest.raises(llfx.AdapterError, match=r"base.ptd does not exist.*the base alone"):
        llfx.save_executorch(baked, tmp_path, "baked", EXAMPLE)
    with llfx.active(gm, []):
        llfx.save_executorch(gm, tmp_path, "none", EXAMPLE)
    llfx.save_executorch(baked, tmp_path, "baked", EXAMPLE)
    check(tmp_path, "baked", gm)
    merged = llfx.merge(gm)
    with pytest.raises(llfx.AdapterError, match="another base"):
        llfx.save_executorch(merged, tmp_path, "merged", EXAMPLE)
    llfx.save_executorch(merged, tmp_path / "merged", "merged", EXAMPLE)
    check(tmp_path / "merged", "merged", merged)


@pytest.mark.broad
def test_values_that_adapter_and_base_share(tmp_path: Path) -> None:
    _, graph = captured(small_net, inputs=(EXAMPLE["ids"],))
    for bias in (graph.get_parameter("blocks.0.gate.bias"), graph.get_parameter("blocks.0.down.bias")):
        with torch.no_grad():
            bias.zero_()
    gm = llfx.rewrite(graph, llfx.LoRA(r=1, target_names="."))  # B is zero, as long as the bias
    llfx.save_executorch(gm, tmp_path, "start", EXAMPLE)
    check(tmp_path, "start", gm)


@pytest.mark.broad
def test_the_slots_of_a_bank_are_an_input(tmp_path: Path) -> None:
    gm = adapted(llfx.Bank(llfx.LoRA(r=2, target_names="."), slots=3))
    slots = torch.tensor([2, 0])
    llfx.save_executorch(gm, tmp_path, "bank", {**EXAMPLE, "adapter_ids": slots})
    for shape in SHAPES:
        rows = torch.arange(shape[0]) % 3
        with torch.no_grad():
            expected = gm(ids(*shape), adapter_ids=rows)
        torch.testing.assert_close(run(tmp_path, "bank", ids(*shape), rows)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.broad
@pytest.mark.parametrize("front_door", ["rewrite", "adapt"])
def test_a_language_model_and_its_step_with_a_cache(front_door: str, tmp_path: Path) -> None:
    model = one_layer_llama().eval()
    cfg = llfx.LoRA(r=2, target_roles=("attention", "mlp"))
    gm = getattr(llfx, front_door)(model, cfg)
    randomise(gm, 0)
    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    llfx.save_executorch(gm, tmp_path, "fr", {"input_ids": ids, "attention_mask": mask}, outputs="logits")
    llfx.save_executorch(gm, tmp_path, "step", cache=True, largest=(2, 16))
    with torch.no_grad():
        expected = gm(input_ids=ids, attention_mask=mask, use_cache=False).logits
    (logits,) = run(tmp_path, "fr", ids, mask)
    seen = mask.bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-5, rtol=1e-5)
    past = [torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8)]
    for begin, end in ((0, 4), (4, 5), (5, 6)):
        logits, *past = run(tmp_path, "step", ids[:, begin:end], mask[:, :end], *past)
        kept = seen[:, begin:end]
        torch.testing.assert_close(logits[kept], expected[:, begin:end][kept], atol=1e-5, rtol=1e-5)


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = adapted(llfx.LoRA(r=2, target_names="."))
    for name in ("", "a/b", "..", ".hidden", 3):
        with pytest.raises(llfx.ConfigError, match="name is a file name"):
            llfx.save_executorch(gm, tmp_path, name, EXAMPLE)  # type: ignore[arg-type]
    for largest in ((0, 4), 5, (1, 2, 3), (1.0, 2)):
        with pytest.raises(llfx.ConfigError, match="largest is two sizes"):
            llfx.save_executorch(gm, tmp_path, "fr", EXAMPLE, largest=largest)  # type: ignore[arg-type]
    with pytest.raises(llfx.AdapterError):
        llfx.save_executorch("model", tmp_path, "fr", EXAMPLE)  # type: ignore[arg-type]
    (tmp_path / "base.ptd").write_bytes(b"not tensors")
    with pytest.raises(llfx.CheckpointError, match=r"base.ptd is not a file of tensors"):
        llfx.save_executorch(gm, tmp_path, "fr", EXAMPLE)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ImportError, match=r"lora_lite_fx\[executorch\]"):
        llfx.save_executorch(gm, tmp_path, "fr", EXAMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["base.ptd"]
