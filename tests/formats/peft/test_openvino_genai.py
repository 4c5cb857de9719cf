"""Adapters in OpenVINO GenAI's pipeline against torch: the answers of a tiny model, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_lite_fx as llfx
from tests.support.openvino_models import write_pipeline
from tests.support.served_causal_models import IDS, causal, logits, tensors_at_random

TOKENS = 16


def answer(model: Any) -> list[int]:
    said = list(IDS)
    for _ in range(TOKENS):
        said.append(int(logits(model, said)[-1].argmax()))
    return said[len(IDS) :]


@pytest.mark.broad
def test_openvino_genai_says_what_torch_says(tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    import openvino

    model = causal("llama")
    write_pipeline(model, tmp_path)
    graph = llfx.capture(model)
    configs = {
        "fr": llfx.LoRA(r=4, alpha=9, rank_pattern={"up": 6}, target_names=(r"_proj$", "lm_head")),
        "it": llfx.PiSSA(r=3, alpha=9, target_names=(r"(q|v)_proj$",)),
    }
    expected, adapters = {"": answer(model)}, {}
    for name, cfg in configs.items():
        gm = llfx.rewrite(graph, cfg)
        tensors_at_random(gm)
        llfx.save_peft(gm, tmp_path / name, target="openvino")
        expected[name] = answer(gm)
        adapters[name] = genai.Adapter(tmp_path / name / "adapter_model.safetensors")
    assert len({tuple(said) for said in expected.values()}) == 3
    given = genai.AdapterConfig(list(adapters.values()))
    # By default the cache is of lower precision, which changes what is said where two tokens are almost as likely.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "ATTENTION_BACKEND": "SDPA"}
    pipeline = genai.LLMPipeline(tmp_path, "CPU", adapters=given, **exact)
    ids = np.array([IDS], dtype=np.int64)
    for name in ("fr", "", "it", "fr"):
        use = genai.AdapterConfig(adapters[name]) if name else genai.AdapterConfig()
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        options = genai.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, do_sample=False)
        assert pipeline.generate(inputs, options, adapters=use).tokens[0] == expected[name]
