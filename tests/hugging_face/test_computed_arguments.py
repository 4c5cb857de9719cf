"""What a model computes itself when an argument is missing is the same in the adapted model: for each kind of call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.compat.transformers import CACHE
from lora_lite_fx.hugging_face.positions import forget_positions
from tests.support.against_wrapper import adapted_and_wrapped, require_equal
from tests.support.conformance import close
from tests.support.models import tiny_llama
from tests.support.releases import cases_by_name, has
from tests.support.selection import slow_after, slow_unless

CASES = cases_by_name()
IDS = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(0))

Inputs = dict[str, Any]


# Positions beside images.

SITES = llfx.LoRA(r=2, target_names=(r"(q|v|o|up)_proj$", "qkv"))
COUNTED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr", "paddleocr_vl", "ernie4_5_vl_moe", "qwen3_5"]


def images_of(model: Any, *leave_out: str) -> Inputs:
    inputs = example_inputs_of(model)
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return {name: value for name, value in inputs.items() if name not in ("position_ids", "labels", *leave_out)}


def padded(inputs: Inputs) -> Inputs:
    """Return a call with two more tokens on the left, which the mask hides in the first row."""
    longer = {
        name: torch.cat([torch.zeros_like(value[:, :2]) + (3 if name == "input_ids" else 0), value], 1)
        for name, value in inputs.items()
        if name in ("input_ids", "mm_token_type_ids")
    }
    mask = torch.ones_like(longer["input_ids"])
    mask[0, :2] = 0
    return {**inputs, **longer, "attention_mask": mask}


def several_per_row(inputs: Inputs) -> Inputs:
    """Return a call with the two images of its first two rows in one, with text between, and a third of its own."""
    doubled: Inputs = {
        name: torch.cat([inputs[name][:1], inputs[name][:1]], 1)
        for name in ("input_ids", "mm_token_type_ids")
        if name in inputs
    }
    per_image = len(inputs["pixel_values"]) // len(inputs["image_grid_thw"])
    return {
        **doubled,
        "pixel_values": inputs["pixel_values"][: 2 * per_image],
        "image_grid_thw": inputs["image_grid_thw"][:2],
    }


def on_its_side(inputs: Inputs) -> Inputs:
    """Return a call whose second image is as high as it was wide."""
    grid = inputs["image_grid_thw"].clone()
    grid[1] = grid[1][[0, 2, 1]]
    return {**inputs, "image_grid_thw": grid}


@pytest.mark.broad
def test_positions_of_images_are_the_models_own_if_a_call_brings_none() -> None:
    """The model was called before, and remembers how much further its positions were than its tokens."""
    model = CASES["qwen2_vl"].builder()().double()
    inputs = images_of(model)
    model(**inputs)
    assert model.model.rope_deltas is not None
    models = adapted_and_wrapped(model, SITES)
    require_equal(models, inputs)
    assert models[0]._graphs.captures == 1  # an example of the config brings positions, which are of the same form


def test_a_copy_that_is_captured_remembers_no_positions() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].rope_deltas = torch.ones(2, 1)
    forget_positions(model)
    assert model[0].rope_deltas is None


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(("qwen2_vl",).__contains__, COUNTED))
def test_calls_with_images_and_without_one_after_the_other(name: str) -> None:
    model = CASES[name].builder()().double()
    inputs = images_of(model)
    models = adapted_and_wrapped(model, SITES)
    adapted, wrapped = models
    text = {"input_ids": torch.where(inputs["input_ids"] > 60, 5, inputs["input_ids"])[:2, :6]}
    require_equal(models, text)
    for call in (inputs, on_its_side(inputs), several_per_row(inputs), padded(inputs)):
        require_equal(models, call)
    require_equal(models, {**padded(inputs), "labels": padded(inputs)["input_ids"]}, training=True)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    actual, expected = (
        each.eval().generate(**padded(inputs), **options, return_dict_in_generate=True).logits for each in models
    )
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs, 1e-7, "logits of generate")
    require_equal(models, text)
    require_equal(models, inputs)
    following = []
    for each in models:
        cache = each(**inputs, use_cache=True)[CACHE]
        following.append(each(input_ids=inputs["input_ids"][:, :2], **{CACHE: cache}).logits)
    close(following[0], following[1], 1e-8, "after a cache")
    close(adapted.model.rope_deltas, wrapped.model.rope_deltas, 0, "what is remembered")


@pytest.mark.broad
def test_positions_that_are_not_those_of_the_models_own_method_are_refused() -> None:
    model = CASES["qwen2_vl"].builder()().double()
    kind: Any = type(model.model)

    class Further(kind):  # type: ignore[misc]
        def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
            if position_ids is None:
                names = ("input_ids", "inputs_embeds", "image_grid_thw", "attention_mask", "mm_token_type_ids")
                known = {name: kwargs.get(name) for name in names}
                known["inputs_embeds"] = self.get_input_embeddings()(known["input_ids"])
                position_ids = self.compute_3d_position_ids(**known)
                position_ids = None if position_ids is None else 2 * position_ids
            return super().forward(*args, position_ids=position_ids, **kwargs)

    model.model.__class__ = Further
    adapted = llfx.adapt(model, SITES)
    with pytest.raises(llfx.CaptureError, match="The way out: pass position_ids"):
        adapted(**images_of(model))


# Calls of text: what a call lacks is filled in if the model does so in calls of that kind.


class WithoutMask(hf.LlamaForCausalLM):
    """Counts positions by twos in calls without a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        if attention_mask is None and position_ids is None and kwargs.get(CACHE) is None:
            position_ids = 2 * torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class WithoutTokens(hf.LlamaForCausalLM):
    """Scales embeddings in a call that begins a text, as models do for which no cache is another case than an empty."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        embedded = self.get_input_embeddings()(input_ids)
        if cache is None or not cache.is_initialized:
            embedded = 3 * embedded
        return super().forward(inputs_embeds=embedded, **kwargs)


class OtherLoss(hf.LlamaForCausalLM):
    """Doubles its loss in calls without a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        result = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None and result.get("loss") is not None:
            result["loss"] = 2 * result["loss"]
        return result


class InTraining(hf.LlamaForCausalLM):
    """Counts positions from one on in training."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        if self.training and position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1).flip(1)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


@pytest.mark.broad
@pytest.mark.parametrize("kind", slow_after(1, [WithoutTokens, WithoutMask, OtherLoss, InTraining]))
def test_a_call_is_not_brought_into_the_form_of_another_kind_of_call(kind: Any) -> None:
    models = adapted_and_wrapped(kind(tiny_llama()).double())
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    for inputs in ({}, {"attention_mask": mask, "labels": IDS}, {"labels": IDS}, {"attention_mask": mask}):
        for training in (False, True):
            require_equal(models, {"input_ids": IDS, **inputs}, training)
    results = []
    for model in models:
        first = model.eval()(IDS, use_cache=True)
        results.append(model(IDS[:, :1], **{CACHE: first[CACHE]}).logits)
    close(results[0], results[1], 1e-8, "after a cache")


class Draws(hf.LlamaForCausalLM):
    """Draws a number that nobody reads in training calls with a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if self.training and attention_mask is not None:
            torch.rand(())
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


def test_calls_that_draw_the_same_numbers_in_another_order_have_one_graph() -> None:
    adapted: Any = llfx.adapt(Draws(tiny_llama(attention_dropout=0.1)), SITES).train()
    for inputs in ({}, {"attention_mask": torch.ones_like(IDS)}):
        adapted(IDS, use_cache=False, **inputs)
    assert len(adapted._graphs.modules()) == 1


class Keeps(hf.BertForMaskedLM):
    """Keeps the mean of its embeddings for calls of another kind, and a table that has the size of its inputs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        self.table = torch.arange(input_ids.shape[1])
        if attention_mask is not None:
            self.kept = embedded.mean()
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, **kwargs)


class Backwards(hf.GPT2LMHeadModel):
    """Counts positions from the last token."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1).flip(1)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


@pytest.mark.broad
def test_positions_count_although_their_embedding_starts_at_zero() -> None:
    config = hf.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model: Any = Backwards(config).double()
    positions = model.transformer.wpe.weight
    with torch.no_grad():
        positions.zero_()
    models = adapted_and_wrapped(model.eval())
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    require_equal(models, {"input_ids": IDS, "attention_mask": mask})
    with torch.no_grad():
        positions.normal_()
    require_equal(models, {"input_ids": IDS, "attention_mask": mask})


class AddsMore(hf.LlamaForCausalLM):
    """Takes what is added to embeddings, and turns their order around then in calls without a mask."""

    def forward(self, *args: Any, more: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if more is not None:
            embedded = kwargs["inputs_embeds"]
            kwargs["inputs_embeds"] = more + (embedded.flip(1) if attention_mask is None else embedded)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


@pytest.mark.broad
def test_a_first_call_with_embeddings_of_zeros_hides_nothing() -> None:
    models = adapted_and_wrapped(AddsMore(tiny_llama()).double())
    drawn = torch.randn(3, 6, 32, dtype=torch.float64)
    for embedded in (torch.zeros_like(drawn), drawn):
        require_equal(models, {"inputs_embeds": embedded, "more": drawn[:, :1]})


@pytest.mark.broad
@pytest.mark.parametrize("is_zero", [False, True])
def test_what_a_call_writes_for_later_ones_is_named(is_zero: bool) -> None:
    config = hf.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model: Any = Keeps(config)
    if is_zero:
        nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.warns(UserWarning, match="Keeps keeps kept from one call") as caught:
        llfx.adapt(model, llfx.LoRA(r=2))
    assert not any("keeps table" in str(warning.message) for warning in caught)


# Types of caches.


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless("gpt2".__eq__, ["llama", "gpt2", "t5", "bart"]))
@pytest.mark.parametrize("dtype", slow_unless(lambda dtype: dtype is torch.bfloat16, [torch.bfloat16, torch.float16]))
def test_caches_under_autocast_have_the_types_that_the_model_gives_them(name: str, dtype: torch.dtype) -> None:
    from .test_generation import CAUSAL, SEQ2SEQ

    torch.manual_seed(0)
    config = copy.deepcopy({**CAUSAL, **SEQ2SEQ}[name])
    auto: Any = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    found = []
    for model in adapted_and_wrapped(auto.from_config(config).eval(), llfx.LoRA(r=2)):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            more = {"decoder_input_ids": IDS[:, :2]} if config.is_encoder_decoder else {}
            result = model(IDS, use_cache=True, **more)
            types = [types_of(result[CACHE])]
            following: Inputs = {"input_ids": IDS[:, :1]}
            if config.is_encoder_decoder:
                following = {"decoder_input_ids": IDS[:, :1], "encoder_outputs": (result.encoder_last_hidden_state,)}
            result = model(**following, **{CACHE: result[CACHE]})
            found.append(([*types, types_of(result[CACHE])], result.logits))
    (ours, our_logits), (theirs, their_logits) = found
    assert ours == theirs
    # Before, the rotations of Llama's keys were in single precision under autocast too.
    assert any(dtype in each for step in theirs for each in step) or not has("transformers", "5.24")
    close(our_logits.float(), their_logits.float(), 2e-2, "logits")


def types_of(cache: Any) -> list[tuple[torch.dtype, torch.dtype]]:
    halves = [getattr(cache, half, None) for half in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for half in halves if half is not None for layer in half.layers] or cache.layers
    return [(layer.keys.dtype, layer.values.dtype) for layer in layers]
