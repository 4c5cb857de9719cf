"""ONNX files of a language model: a step with a cache, ONNX Runtime GenAI, and OpenVINO."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import perturb
from tests.support.conformance import close
from tests.support.onnx_models import Session, adapted, config, ids

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LAYERS, HEADS, KEYS, WIDTH, VOCABULARY = 1, 4, 2, 8, 64


def chat() -> Any:
    """Return a language model with a LoRA whose values are random."""
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = llfx.adapt(LlamaForCausalLM(cfg).eval(), llfx.LoRA(r=4))
    perturb(model, 1)
    return model


PROMPT = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def with_cache(session: Session, adapter: Path | None) -> torch.Tensor:
    """Return logits of the prompt: of three tokens at once into an empty cache, and then token by token."""
    outputs = [output.name for output in session.session.get_outputs()]
    empty = torch.zeros(2, KEYS, 0, WIDTH)
    past = {f"past_key_values.{layer}.{kind}": empty for layer in range(LAYERS) for kind in ("key", "value")}
    logits = []
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        results = session(
            adapter, input_ids=PROMPT[:, start:end], attention_mask=torch.ones(2, end, dtype=torch.long), **past
        )
        named = dict(zip(outputs, results, strict=True))
        logits.append(named.pop("logits"))
        past = {name.replace("present", "past_key_values"): tensor for name, tensor in named.items()}
    return torch.cat(logits, 1)


def genai_config(file: str) -> dict[str, Any]:
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "context_length": 64,
            "vocab_size": VOCABULARY,
            "decoder": {
                "filename": file,
                "head_size": WIDTH,
                "hidden_size": HEADS * WIDTH,
                "num_attention_heads": HEADS,
                "num_hidden_layers": LAYERS,
                "num_key_value_heads": KEYS,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 20, "do_sample": False, "past_present_share_buffer": False},
    }


@pytest.mark.broad
def test_a_step_with_a_cache_prefills_and_decodes_also_in_genai(tmp_path: Path) -> None:
    model = chat()
    llfx.save_onnx(model, tmp_path / "m.onnx", cache=True)
    llfx.save_onnx_adapter(model, tmp_path / "fr")
    session = Session(tmp_path / "m.onnx")
    for names, adapter in ((["default"], tmp_path / "fr"), ([], None)):
        with llfx.active(model, names), torch.no_grad():
            expected = model(input_ids=PROMPT, use_cache=False).logits
        close(with_cache(session, adapter), expected, 1e-5, str(names))
    genai = pytest.importorskip("onnxruntime_genai")
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config("m.onnx")))
    served = genai.Model(str(tmp_path))
    adapters = genai.Adapters(served)
    adapters.load(str(tmp_path / "fr"), "fr")
    for names in (["default"], []):
        options = genai.GeneratorParams(served)
        options.set_search_options(max_length=12, batch_size=1)
        generator = genai.Generator(served, options)
        if names:
            generator.set_active_adapter(adapters, "fr")
        generator.append_tokens(PROMPT[0].int().numpy())
        while not generator.is_done():
            generator.generate_next_token()
        with llfx.active(model, names), torch.no_grad():
            expected = model.generate(PROMPT[:1], max_length=12, do_sample=False)
        assert generator.get_sequence(0).tolist() == expected[0].tolist()


@pytest.mark.broad
def test_the_page_on_onnx_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "hand_over" / "onnx.md"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    gm, given = namespace["gm"], {name: torch.from_numpy(value) for name, value in namespace["inputs"].items()}
    with llfx.active(gm, "it"):
        close(torch.from_numpy(namespace["logits"][0]), gm(**given).logits, 1e-5, "the page")


@pytest.mark.broad
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "HRA"])
def test_openvino_runs_the_file_and_the_exported_program(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, gm = adapted(config(name))
    x = ids(3, 5)
    expected = gm(ids=x)
    llfx.save_onnx(gm, tmp_path / "baked.onnx", bake=True)
    llfx.save_onnx(gm, tmp_path / "m.onnx")
    core = openvino.Core()

    def run(source: Any) -> torch.Tensor:
        compiled = core.compile_model(openvino.convert_model(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([x.numpy()])[0])

    close(run(tmp_path / "baked.onnx"), expected, 1e-5, "the baked file")
    close(run(tmp_path / "m.onnx"), expected if name == "HRA" else model(x), 1e-5, "the file, without an adapter")
    close(run(llfx.export(gm, bake=True)), expected, 1e-5, "the exported program")
