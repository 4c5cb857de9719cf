"""`python -m lora_lite_fx export`: what it writes is run in its runtime; bad input is one line and writes nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from lora_lite_fx.hand_over import compared, export_command
from lora_lite_fx.hand_over.targets import TARGETS
from tests.inspection.test_inspect import LLAMA
from tests.support.conformance import randomise
from tests.support.selection import broad_after, broad_unless


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(29)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter of random values as a file, and as a PEFT directory."""
    path = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(LLAMA)
    model.save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    gm = llfx.rewrite(model, llfx.LoRA(r=2))
    randomise(gm, 1)
    llfx.save(gm, path / "fr.safetensors")
    llfx.save_peft(gm, path / "peft")
    return path


def export(folder: Path, to: str, out: Path, *options: str, adapter: str | None = "fr.safetensors") -> int:
    chosen = [] if adapter is None else ["--adapter", str(folder / adapter)]
    return main(["export", str(folder / "model"), *chosen, "--to", to, str(out), *options])


OUT = {"pt2": "m.pt2", "aoti": "m.pt2", "onnx": "m.onnx", "gguf": "fr.gguf"}
HEAVY = ("onnx", "gguf", "executorch", "aoti")
"""Targets whose package is not a part of the extra `test`, or that compile."""


@pytest.mark.parametrize("to", broad_after(1, ["merged", "pt2", "vllm", "sglang", "openvino", *HEAVY]))
def test_what_is_written_is_compared_in_its_runtime(
    to: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(TARGETS[to].package)
    out = tmp_path / OUT.get(to, to)
    assert export(folder, to, out) == 0
    printed, progress = capsys.readouterr()
    (line,) = printed.splitlines()
    assert line.startswith("wrote ")
    assert str(out) in line
    if to == "gguf":
        assert "28 tensors with 928 numbers read back, of an adapter with 928" in line
    else:
        (figure,) = [word for word in line.split() if "e-" in word or "e+" in word]
        assert "logits" in line
        assert float(figure) < 1e-5
        assert line.endswith(" on a batch of 2 x 9 tokens")
    if to == "merged":
        assert transformers.AutoTokenizer.from_pretrained(out)("w5 w7").input_ids == [5, 7]
    assert "loaded " in progress
    assert f"wrote {out} in " in progress
    assert export(folder, to, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--overwrite" in line


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(),  # of which transformers makes a tokenizer without a vocabulary
        transformers.LlamaConfig(),
        transformers.ViTConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_without_a_tokenizer_gets_none(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    export_command._write_tokenizer(str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_base_alone_a_step_with_a_cache_and_a_peft_directory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(folder, "pt2", tmp_path / "base.pt2", "--outputs", "logits", adapter=None) == 0
    assert export(folder, "pt2", tmp_path / "step.pt2", "--cache", "--bake", adapter="peft") == 0
    base, step = capsys.readouterr().out.splitlines()
    assert "logits equal torch's" in base
    assert "logits, present_key_0" in step
    assert step.endswith(" in the cache")
    program: Any = torch.export.load(tmp_path / "step.pt2").module()
    ids = torch.randint(29, (1, 3))
    empty = {f"past_{kind}_{layer}": torch.zeros(1, 2, 0, 4) for layer in range(2) for kind in ("key", "value")}
    with torch.no_grad():
        logits = program(input_ids=ids, attention_mask=torch.ones_like(ids), **empty)[0]
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
        expected = llfx.adapt(model, folder / "peft").eval()(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.broad
def test_a_program_is_exported_again_with_an_adapter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(folder, "pt2", tmp_path / "base.pt2", adapter=None) == 0
    arguments = ["export", str(tmp_path / "base.pt2"), "--adapter", str(folder / "fr.safetensors"), "--to", "pt2"]
    assert main([*arguments, str(tmp_path / "fr.pt2")]) == 2
    assert "--trust" in capsys.readouterr().err
    assert not (tmp_path / "fr.pt2").exists()
    assert main([*arguments, str(tmp_path / "fr.pt2"), "--trust"]) == 0
    assert "equal torch's" in capsys.readouterr().out


MISTAKES = {
    "no adapter file": (["--adapter", "{folder}/none"], "pt2", "m.pt2", "there is no .*none"),
    "no model": ([], "pt2", "m.pt2", r"there is no .*/gone"),
    "a suffix": ([], "pt2", "m.onnx", r"--to pt2 writes a \.pt2 file"),
    "no folder": ([], "pt2", "none/m.pt2", "there is no folder .*none"),
    "an adapter is needed": ([], "vllm", "out", "name it by --adapter"),
    "outputs of an adapter": (
        ["--adapter", "{folder}/peft", "--outputs", "logits"],
        "vllm",
        "out",
        "--outputs is for programs",
    ),
    "a name": (["--name", "fr"], "pt2", "m.pt2", "--name is for --to executorch"),
    "an output": (["--outputs", "hidden"], "pt2", "m.pt2", "does not return 'hidden'"),
    "a broken adapter": (["--adapter", "{folder}/model/config.json"], "pt2", "m.pt2", "config.json"),
}


@pytest.mark.parametrize("name", broad_unless(lambda name: name != "an output", MISTAKES))  # which exports
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, to, out, message = MISTAKES[name]
    model = folder / ("gone" if name == "no model" else "model")
    options = [option.format(folder=folder) for option in options]
    assert main(["export", str(model), *options, "--to", to, str(tmp_path / out)]) == 2
    printed, told = capsys.readouterr()
    *_, line = told.splitlines()
    assert printed == ""
    assert line.startswith("python -m lora_lite_fx: error: ")
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gguf", "torch") else find(name))
    assert export(folder, "gguf", tmp_path / "fr.gguf") == 2
    assert "--to gguf needs gguf: pip install 'lora_lite_fx[gguf]'" in capsys.readouterr().err
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    written = compared.Written("pt2", tmp_path / "m.pt2", gm, None, None, False, "")
    assert compared.compared(written) == "not compared, because torch is not installed"


@pytest.mark.broad
def test_other_results_are_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(written: compared.Written, graph: Any, batch: dict[str, torch.Tensor]) -> Any:
        return graph.gm(**batch) * 1.01

    monkeypatch.setitem(compared._READERS, "pt2", (other, "torch"))
    assert export(folder, "pt2", tmp_path / "m.pt2") == 2
    assert "differ from torch's by 1.0e-02 of the largest: do not use it" in capsys.readouterr().err


def test_options_are_checked_without_torch(folder: Path, tmp_path: Path) -> None:
    arguments = ["export", str(folder / "model"), "--to", "vllm", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lora_lite_fx", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("name it by --adapter")
    assert "lora_lite_fx.hand_over.targets" in done.stderr
    assert "torch.nn" not in done.stderr
