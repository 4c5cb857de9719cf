"""Adapted models of every kind of class equal the eager wrapper: encoders, classifiers, embeddings, state spaces."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.compat.transformers import CACHE
from lora_lite_fx.hugging_face.caches import probe
from lora_lite_fx.hugging_face.causal_lm import _NO_STATES_IN_TRAINING, normalize_call
from lora_lite_fx.hugging_face.forms import Forms
from lora_lite_fx.hugging_face.positions import Counted
from tests.support.conformance import close, randomise
from tests.support.models import tiny_llama
from tests.support.releases import since
from tests.support.selection import slow_after, slow_unless

BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = tiny_llama(hidden_size=16, intermediate_size=24, pad_token_id=0, num_labels=3)
MAMBA = hf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=99, state_size=4, pad_token_id=0, eos_token_id=2)
T5GEMMA_PART: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 99,
    "dropout_rate": 0.0,
    "layer_types": ["full_attention"],
}
T5GEMMA = hf.T5GemmaConfig(encoder=T5GEMMA_PART, decoder=T5GEMMA_PART, dropout_rate=0.0)
MODELS: dict[str, tuple[Any, Any]] = {
    "an encoder with a head for each token, which has no cache": (hf.BertLMHeadModel, hf.BertConfig(**BERT)),
    "embeddings of a decoder": (hf.LlamaModel, DECODER),
    "a classifier": (hf.LlamaForSequenceClassification, DECODER),
    "a classifier that reads its labels": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config(**BERT)),
    "a state space": (hf.MambaForCausalLM, MAMBA),
    "an encoder and a decoder that makes a cache in evaluation alone": (hf.T5GemmaForConditionalGeneration, T5GEMMA),
}
CONFIG = llfx.LoRA(r=2, target_roles=("reader", "writer"))


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """Return an adapted model and the eager wrapper, with the same adapters."""
    torch.manual_seed(0)
    cls, config = MODELS[name]
    # DeBERTa's own loss is in single precision.
    base = cls(config).to(torch.float32 if cls is hf.DebertaV2ForSequenceClassification else torch.float64).eval()
    return both_ways(base)


def both_ways(base: Any, example_inputs: Any = None) -> tuple[Any, Any]:
    """Return `base` as an adapted model and in the eager wrapper, with the same adapters."""
    adapted, wrapped = llfx.adapt(base, CONFIG, example_inputs), llfx.wrap(base, CONFIG, example_inputs)
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    return adapted, wrapped


def calls(model: Any) -> list[dict[str, Tensor]]:
    """Return calls as they come: ids alone, and padded ids of another batch and length, with the labels of texts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    padded = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "Classification" in type(model).__name__:
        padded["labels"] = torch.randint(2, (4,), generator=generator)
    if model.config.is_encoder_decoder:
        return [{**call, "labels": call["input_ids"] % 7 + 1} for call in ({"input_ids": ids[:2, :5]}, padded)]
    return [{"input_ids": ids[:2, :5]}, padded]


EVERYDAY = ("an encoder with a head for each token, which has no cache", "a classifier that reads its labels")


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(1, slow_unless(EVERYDAY.__contains__, MODELS)))
def test_outputs_and_gradients_equal_those_of_the_eager_wrapper(name: str) -> None:
    adapted, wrapped = pair(name)
    tolerance = 1e-10 if adapted.dtype == torch.float64 else 1e-4
    for call in calls(adapted):
        gradients = []
        actual, expected = adapted(**call), wrapped(**call)
        assert type(actual) is type(expected)
        assert actual.keys() == expected.keys()
        assert ("labels" in call) == ("loss" in actual)
        for output in actual:
            if isinstance(actual[output], Tensor):
                close(actual[output], expected[output].detach(), tolerance, output)
        for model, result in ((adapted, actual), (wrapped, expected)):
            first = next(tensor for tensor in result.values() if isinstance(tensor, Tensor))
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            weights = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view(first.shape)
            found = torch.autograd.grad((first * weights).sum(), [*named.values()], allow_unused=True)
            gradients.append(dict(zip(named, found, strict=True)))
        for name_, gradient in gradients[0].items():
            if (other := gradients[1][name_]) is not None:
                close(torch.zeros_like(other) if gradient is None else gradient, other, tolerance, name_)
    assert adapted._graphs.captures <= 3  # one for the examples that adapt makes, and one for each kind of call


@pytest.mark.broad
def test_a_model_whose_cache_has_no_attention_generates() -> None:
    adapted, wrapped = pair("a state space")
    ids = calls(adapted)[0]["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        texts = [model.generate(ids, **options, num_beams=beams) for model in (adapted, wrapped)]
        assert torch.equal(*texts)


@pytest.mark.broad
@since("transformers", "5.25", "a state space takes tokens back")
def test_a_state_space_counts_the_tokens_of_its_cache_and_takes_some_back() -> None:
    ids = calls(hf.MambaForCausalLM(MAMBA))[1]["input_ids"][1:]
    found = []
    for model in pair("a state space"):
        logits: list[Tensor] = []
        cache = hf.DynamicCache(config=model.config)
        cache.activate_past_recording(recurrent_states_to_keep=3)
        for start, end, back in ((0, 5, 0), (5, 8, 2), (8, 9, 0)):
            logits.append(model(input_ids=ids[:, start:end], use_cache=True, **{CACHE: cache}).logits.detach())
            cache.crop(-back)
        assert cache.get_seq_length() == 7
        layer: Any = cache.layers[0]
        found.append([*logits, layer.conv_states[0].detach(), layer.recurrent_states[0].detach()])
    for number, (actual, expected) in enumerate(zip(*found, strict=True)):
        close(actual, expected, 1e-10, f"number {number} of logits and states")


@pytest.mark.broad
def test_an_encoder_takes_several_texts_in_one_row() -> None:
    """Check it of positions that start again, by which releases of transformers since 5.25 tell texts apart."""
    adapted, wrapped = pair("an encoder with a head for each token, which has no cache")
    ids = calls(adapted)[1]["input_ids"][1:]
    rows = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6], [*range(9)]])
    for positions in (rows, rows[2:].repeat(3, 1)):
        call = {"input_ids": ids, "position_ids": positions}
        close(adapted(**call).logits, wrapped(**call).logits, 1e-10, "logits")


def dory() -> Any:
    """Return a model that adds layers to its cache for layers that run twice."""
    config = hf.DoryConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=99,
        n_input_layers=1,
        n_recurrent_layers=1,
        n_output_layers=1,
        num_hidden_layers=3,
        sliding_window=4,
        layer_types=["sliding_attention"] * 3,
        pad_token_id=0,
        eos_token_id=2,
    )
    return hf.DoryForCausalLM(config).eval()


@pytest.mark.broad
@since("transformers", "5.24", "Dory is there")
def test_a_cache_has_the_layers_that_the_model_adds_to_it() -> None:
    model = dory()
    call = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    cache = normalize_call(model, probe(model), call, True).arguments[CACHE]
    assert [(layer.sliding_window, layer.keys.shape) for layer in cache.layers] == [(4, (2, 1, 0, 8))] * 4


@pytest.mark.slow
@since("transformers", "5.24", "Dory is there")
def test_a_cache_that_the_model_adds_layers_to_is_filled() -> None:
    adapted, wrapped = both_ways(dory())
    ids = torch.arange(3, 9).repeat(2, 1)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    made = [model.generate(ids, **options, output_logits=True) for model in (adapted, wrapped)]
    close(torch.stack(made[0].logits), torch.stack(made[1].logits), 1e-5, "logits")
    lengths = [[layer.get_seq_length() for layer in each[CACHE].layers] for each in made]
    assert lengths[0] == lengths[1] == [8] * 4


class Codes(hf.LlamaForCausalLM):
    """A decoder of two codes for each token, as speech models are: it raises for tokens of another form."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, cache: Any = None, use_cache: Any = None, **kwargs: Any
    ) -> Any:
        embedded = self.get_input_embeddings()(input_ids + torch.tensor([0, 7])).sum(-2)
        return super().forward(
            inputs_embeds=embedded, attention_mask=attention_mask, use_cache=use_cache, **{CACHE: cache}, **kwargs
        )


@pytest.mark.broad
def test_a_decoder_of_several_codes_for_each_token_is_adapted() -> None:
    model: Any = Codes(DECODER).train(False)
    ids = torch.randint(1, 9, (3, 5, 2))
    adapted, wrapped = both_ways(model, {"input_ids": ids})
    other = torch.randint(1, 9, (2, 4, 2))
    close(adapted(other).logits, wrapped(other).logits, 1e-5, "logits")


class TwoCodes(hf.LlamaForCausalLM):
    """A decoder whose logits are those of two codes for each token, with a loss of its own, as Higgs Audio's."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        result.logits = torch.cat([result.logits, -result.logits], -1)
        if labels is not None:
            result.loss = result.logits.square().mean()
        return result

    forward.__signature__ = inspect.signature(hf.LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_the_loss_of_other_logits_than_those_of_the_vocabulary_is_the_models_own() -> None:
    model = TwoCodes(DECODER).train(False)
    decoder, call = probe(model), {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    forms = Forms(model, lambda own_buffers=False: model)
    no_positions = Counted(None, {})
    assert forms.of(model, decoder, call, no_positions, False) is True
    assert forms.of(model, decoder, {**call, "labels": call["input_ids"]}, no_positions, False) is None


RWKV = hf.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=99, attention_hidden_size=16, rescale_every=0)


@pytest.mark.broad
@pytest.mark.parametrize(
    "model", [(hf.MambaForCausalLM, MAMBA), pytest.param((hf.RwkvForCausalLM, RWKV), marks=pytest.mark.slow)]
)
def test_no_states_are_kept_in_training_where_the_model_keeps_none(model: tuple[Any, Any]) -> None:
    adapted, wrapped = both_ways(model[0](model[1]).double().train())
    ids = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(1))
    gradients = []
    for each in (adapted, wrapped):
        result = each.train()(input_ids=ids, labels=ids)
        assert set(result) == {"loss", "logits"}
        result.loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 0
    for name, gradient in zip(gradients[0], gradients[1].values(), strict=True):
        close(gradients[0][name], gradient, 1e-10, name)


def test_the_types_that_keep_no_states_in_training_are_those_of_transformers() -> None:
    sources = Path(hf.__file__).parent.glob("models/*/modeling_*.py")
    said = re.compile(
        "use_cache if not self.training else|not self.training and use_cache|cache is None and not self.training"
    )
    found = {path.parent.name for path in sources if said.search(path.read_text())}
    assert found
    assert found <= set(_NO_STATES_IN_TRAINING)


class FlatPositions(hf.LlamaForCausalLM):
    """A decoder that takes a flat view of its positions, as Kosmos-2.5 does."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids.view(-1).view(input_ids.shape)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


@pytest.mark.broad
def test_positions_may_be_viewed_as_one_row() -> None:
    model: Any = FlatPositions(DECODER).train(False)
    cls: Any = FlatPositions
    cls.forward.__signature__ = inspect.signature(hf.LlamaForCausalLM.forward)
    adapted, wrapped = both_ways(model)
    for call in calls(adapted):
        close(adapted(**call).logits, wrapped(**call).logits, 1e-5, "logits")
