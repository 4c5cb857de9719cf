"""The examples run as their docstrings show them, on small models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.support.models import tiny_llama

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    """Run an example in a process of its own, because it may register variants, and return what it prints."""
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.broad
def test_methods_of_papers_train_and_equal_the_wrapper_and_merge_or_are_refused() -> None:
    _, *lines = run("examples/own_variants.py", "--rank", "4").splitlines()
    assert [line.split()[0] for line in lines] == ["OwnLoRAXS", "MoRA", "SVF", "LoReFT", "ParallelAdapter"]
    for line in lines:
        name, _, before, after, to_wrap, *merged = line.split()
        assert float(after) < float(before), line
        assert float(to_wrap) < 1e-5, line
        if name == "ParallelAdapter":
            assert "refused" in line
        else:
            assert float(merged[0]) < 1e-5, line


@pytest.mark.broad
def test_variants_are_counted_on_any_model(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(tiny_llama()).save_pretrained(tmp_path)
    text = run("examples/variants.py", "--model", str(tmp_path), "--variants", "lora", "--tokens", "8")
    *_, base, lora = text.splitlines()
    assert base.startswith("| none | 0 |")
    assert lora.startswith("| `LoRA` |")


@pytest.mark.broad
def test_a_sweep_compares_configs_and_draws_the_gradients(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    text = run("examples/sweep.py", "--layers", "1", "--ranks", "2", "4", "--out", str(picture))
    assert "captured 8 sites" in text
    assert "8 configs in" in text
    lines = [line.split() for line in text.splitlines() if ", r=" in line]
    assert [int(line[-5]) for line in lines] == [2, 2, 4, 4, 3, 3, 7, 7]
    assert len({line[-3] for line in lines}) == 1, "the start values change nothing, so the losses are equal"
    assert picture.stat().st_size > 10_000


@pytest.mark.broad
def test_memory_is_told_beside_time(tmp_path: Path) -> None:
    run("examples/memory_plans.py", "--quick", "--layers", "2", "--out", str(tmp_path / "memory.txt"))
    _, _, *lines = (tmp_path / "memory.txt").read_text().splitlines()
    rows = {name: values for name, *values in (line.split() for line in lines[:6])}
    assert list(rows) == ["fast", "0.8", "balanced", "0.5", "0.35", "checkpoint_layers"]
    parts = {name: float(values[1]) for name, values in rows.items()}
    assert parts["fast"] == 1.0
    assert parts["0.8"] <= 0.81
    assert parts["0.5"] <= 0.51
    assert parts["0.35"] <= 0.36
    assert parts["checkpoint_layers"] < 0.2


@pytest.mark.slow
def test_waits_are_told_in_seconds_and_in_units_of_a_rewrite() -> None:
    _, head, *lines = run("examples/waits.py", "--quick").splitlines()
    assert head.split()[:3] == ["seconds", "imports", "weights"]
    rows = {name: values for name, *values in (line.split() for line in lines[:3])}
    assert list(rows) == ["PEFT", "rewrite", "adapt"]
    for _, *values in (line.split() for line in lines[:3]):
        *parts, in_all, _ = map(float, values)
        assert in_all == pytest.approx(sum(parts), abs=0.05)
    assert lines[3] == "units of one rewrite"
    assert len(lines) == 12


@pytest.mark.broad
def test_a_step_is_told_by_operator(tmp_path: Path) -> None:
    run("examples/benchmark_profile.py", "--quick", "--rows", "4", "--out", str(tmp_path / "profile.txt"))
    _, _, title, *rows = (tmp_path / "profile.txt").read_text().splitlines()
    assert title.split() == ["tiny,", "train,", "LoRA", "base", "peft", "ours", "ms", "a", "step"]
    *parts, whole = [[float(value) for value in row.split()[-3:]] for row in rows]
    assert len(parts) == 5
    for column, total in zip(zip(*parts, strict=True), whole, strict=True):
        assert abs(sum(column) - total) < 0.5, "rounded to tenths"
        assert total > 0


@pytest.mark.slow
def test_compile_times_are_told_and_a_saved_cache_is_loaded() -> None:
    text = run("examples/compile_time.py", "--quick", "--width", "64", "--tokens", "8")
    names = [line.split(" layers:")[0].split() for line in text.splitlines()]
    assert names == [
        ["merged", "1"], ["PEFT", "1"], ["whole", "1"],
        ["whole", "2"], ["by", "layer", "2"], ["whole", "4"], ["by", "layer", "4"],
        ["by", "layer,", "saved", "2"], ["by", "layer,", "loaded", "2"],
    ]  # fmt: skip
    losses = [line.split()[-1] for line in text.splitlines()]
    assert losses[0] == losses[2] != losses[1], "PEFT's values are others"
    assert losses[3] == losses[4] == losses[7] == losses[8]
    assert losses[5] == losses[6]


@pytest.mark.broad
def test_many_adapters_train_at_once(tmp_path: Path) -> None:
    text = run(
        "examples/many.py",
        "--model",
        "tiny",
        "--adapters",
        "3",
        "--steps",
        "12",
        "--lr",
        "0.02",
        "--out",
        str(tmp_path),
    )
    assert "a step of 3 adapters at once:" in text
    assert len(re.findall(r"text \d: held-out loss", text)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{slot}.safetensors" for slot in range(3)),
        "many.png",
    ]
    assert (tmp_path / "many.png").stat().st_size > 10_000


@pytest.mark.broad
def test_a_classifier_trains_its_head_beside_an_adapter(tmp_path: Path) -> None:
    text = run("examples/classify.py", "--model", "tiny", "--steps", "20", "--out", str(tmp_path))
    (scores,) = re.findall(r"held-out accuracy (\d+)% before, (\d+)% after", text)
    before, after = map(int, scores)
    assert after > before
    assert re.search(r"score +head, reader +32 +3 +Full +96\n", text)
    assert "logits differ by 0.0e+00" in text
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert (tmp_path / "confusion.png").stat().st_size > 5_000


@pytest.mark.broad
def test_a_chat_model_is_fine_tuned_by_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    text = run("examples/sft.py", "--model", "tiny", "--steps", "10", "--out", str(tmp_path))
    ((before, after),) = re.findall(r"held-out loss ([\d.]+) before, ([\d.]+) after", text)
    assert float(after) < float(before)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "sft.png").stat().st_size > 5_000


@pytest.mark.broad
def test_sentence_embeddings_train_with_the_trainer_of_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    text = run("examples/embed.py", "--model", "tiny", "--steps", "20", "--out", str(tmp_path))
    ((before, after),) = re.findall(r"others by ([-\d.]+) before, ([-\d.]+) after", text)
    assert float(after) != float(before), "a random model of bytes has little to learn, but it moves"
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "similarity.png").stat().st_size > 5_000


@pytest.mark.broad
def test_a_model_of_timm_learns_shapes(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    text = run("examples/vision.py", "--steps", "60", "--out", str(tmp_path))
    ((before, after),) = re.findall(r"held-out accuracy (\d+)% before, (\d+)% after", text)
    assert int(after) > int(before) + 15
    assert "logits differ by 0.0e+00" in text
    assert (tmp_path / "vision.png").stat().st_size > 20_000


@pytest.mark.broad
def test_a_pipeline_of_diffusers_runs_its_adapted_unet(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    text = run("examples/diffusion.py", "--steps", "30", "--out", str(tmp_path))
    ((before, after),) = re.findall(r"loss ([\d.]+) before, ([\d.]+) after", text)
    assert float(after) < float(before)
    assert "images differ by 0.0e+00" in text
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "diffusion.png").stat().st_size > 20_000


@pytest.mark.slow
def test_the_comparison_on_quantized_bases_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    text = run("examples/quantised.py", "--quick", "--out", str(tmp_path / "quantised.txt"))
    *_, dense, four_bit = text.splitlines()
    assert [float(line.split()[-5]) < 1e-5 for line in (dense, four_bit)] == [True, True]
    assert [float(line.split()[-4]) <= float(line.split()[-3]) for line in (dense, four_bit)] == [True, True]
    assert (tmp_path / "quantised.txt").read_text() == text
