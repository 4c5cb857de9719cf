"""Example inputs that are made of a config, and arguments that say how images lie."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import lora_lite_fx as llfx
from lora_lite_fx.capture.capture_model import origin_of
from lora_lite_fx.capture.inputs.config_values import Values
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.rewriting.eager import wrap_again
from tests.support.conformance import randomise
from tests.support.models import tiny_llama, tiny_t5
from tests.support.releases import cases_by_name
from tests.support.selection import broad_after, slow_after
from tests.survey.tiny import tiny_model

CASES = cases_by_name()
WHISPER: dict[str, Any] = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 9, "encoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
}

ARGUMENTS = {
    "clip": {"pixel_values", "labels"},
    "siglip2": {"pixel_values", "pixel_attention_mask", "spatial_shapes"},
    "wav2vec2-bert": {"input_features"},
    "bros": {"input_ids", "attention_mask", "bbox", "labels"},
    "canine": {"input_ids", "attention_mask", "labels"},
    "patchtst": {"past_values"},
    "time_series_transformer": {
        *("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"),
    },
    "cohere_compass_vision": {"hidden_states", "grid_thw"},
    "audioflamingo3_encoder": {"input_features", "input_features_mask"},
    "voxtral_realtime": {"input_ids", "attention_mask", "input_features", "labels"},
    "dia": {"input_ids", "attention_mask", "decoder_input_ids", "labels"},
    "blip_2_qformer": {"query_embeds", "encoder_hidden_states"},
    "decision_transformer": {"states", "actions", "rewards", "returns_to_go", "timesteps"},
    "granite_speech5_ctc": {"input_features"},
    "gemma4_vision": {"pixel_values", "pixel_position_ids"},
    "lxmert": {"input_ids", "attention_mask", "visual_feats", "visual_pos"},
    "fun_asr_nano_encoder": {"input_features", "input_features_mask"},
    "gemma4_audio": {"input_features"},
    "lightglue": {"pixel_values"},
    "mimi_decoder": {"latents"},
    "pocket_tts_audio_tokenizer_decoder": {"latents"},
    "kyutai_speech_to_text": {"input_ids", "attention_mask", "labels"},
    "sam3": {"input_ids", "attention_mask", "pixel_values"},
    "oneformer": {"pixel_values", "task_inputs"},
    "perceiver": {"inputs", "labels"},
    "speech-encoder-decoder": {"input_values", "decoder_input_ids"},
    "xcodec2": {"input_values", "input_features"},
    "muse_spark_audio": {"input_values"},
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states"},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states"},
    "efficientloftr": {"pixel_values"},
    "blip-2": {"input_ids", "attention_mask", "pixel_values", "labels"},
    "llava_next": {"input_ids", "attention_mask", "pixel_values", "image_sizes"},
    "glm4v": {
        *("input_ids", "attention_mask", "position_ids", "mm_token_type_ids"),
        *("pixel_values", "image_grid_thw"),
    },
}


# One type of each form in which models take images.
_GRID = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
IMAGES = {
    "fuyu": {"input_ids", "attention_mask", "pixel_values"},
    "kimi_k25": _GRID,
    "inkling2": _GRID,
    "video_llama_3": _GRID | {"image_merge_sizes"},
    "paddleocr_vl": _GRID | {"position_ids", "mm_token_type_ids"},
    "qwen2_5_omni_thinker": _GRID | {"position_ids", "input_features", "feature_attention_mask"},
    "nemotron_h_omni": {"input_ids", "attention_mask", "pixel_values", "image_grid_hw"},
    "minicpmv4_6": {"input_ids", "attention_mask", "pixel_values", "target_sizes"},
    "granite_docling": {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "tile_fine_mask"},
    "deepseek_vl_hybrid": {"input_ids", "attention_mask", "pixel_values", "high_res_pixel_values"},
    "kosmos-2": {"input_ids", "attention_mask", "pixel_values", "image_embeds_position_mask", "labels"},
    "modernvbert": {"input_ids", "attention_mask", "pixel_values"},
    "pix2struct": {"flattened_patches", "labels"},
}

# One type of each form in which models take sound beside text.
SOUNDS = {
    "voxtral": {"input_ids", "attention_mask", "input_features"},
    "glmasr": {"input_ids", "attention_mask", "input_features", "input_features_mask"},
    "qwen2_audio": {"input_ids", "attention_mask", "input_features", "feature_attention_mask"},
    "omniasr": {"input_ids", "attention_mask", "input_values"},
}


def test_a_decoder_without_a_head_gets_tokens_beside_sound() -> None:
    model = hf.WhisperModel(hf.WhisperConfig(**WHISPER, vocab_size=99, pad_token_id=0))
    assert example_inputs_of(model).keys() == {"input_features", "decoder_input_ids"}


@pytest.mark.parametrize("without", [(), ("labels",)])
def test_labels_may_be_left_out_for_the_tokens_of_a_decoder(without: tuple[str, ...]) -> None:
    model = hf.T5ForConditionalGeneration(tiny_t5())
    of_decoder = "decoder_input_ids" if without else "labels"
    assert example_inputs_of(model, without).keys() == {"input_ids", "attention_mask", of_decoder}
    assert "labels" not in example_inputs_of(hf.LlamaForCausalLM(tiny_llama()), ("labels",))


@pytest.mark.parametrize("name", broad_after(4, [*IMAGES, *SOUNDS]))
def test_a_model_computes_something_of_its_example_images_and_sounds(name: str) -> None:
    model = CASES[name].builder()()
    inputs = example_inputs_of(model)
    assert inputs.keys() == (IMAGES | SOUNDS)[name]
    images = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]
    gradients = torch.autograd.grad(model(**inputs).logits.sum(), images, allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_table_that_grows_in_a_run_without_data_keeps_its_values() -> None:
    model = CASES["kosmos-2"].builder()()
    model.config.latent_query_num = 80  # more tokens than the table of positions has
    with contextlib.suppress(llfx.CaptureError):
        example_inputs_of(model)
    assert all(type(buffer) is torch.Tensor for buffer in model.buffers())


@pytest.mark.parametrize("name", ["dinov3_vit", "sam3_vision_model"])  # by a function, and by a static method
def test_functions_forget_what_they_computed_without_data(name: str) -> None:
    model = CASES[name].builder()()
    inputs = example_inputs_of(model)
    with torch.no_grad():
        assert {type(value) for value in pytree.tree_leaves(dict(model(**inputs)))} == {torch.Tensor}


def test_a_module_forgets_what_it_computed_without_data() -> None:
    model = CASES["clvp"].builder()()
    inputs = example_inputs_of(model)
    attributes = [value for module in model.modules() for value in vars(module).values()]
    assert {type(value) for value in attributes if isinstance(value, torch.Tensor)} <= {torch.Tensor}
    with torch.no_grad():
        assert {type(value) for value in pytree.tree_leaves(dict(model(**inputs)))} <= {torch.Tensor, type(None)}


@functools.lru_cache
def positions(length: int) -> torch.Tensor:
    return torch.arange(length) / length


def test_functions_forget_what_they_computed_while_they_were_traced() -> None:
    class Places(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input + positions(4))

    model, inputs = Places(4, 4), (torch.randn(3, 4),)
    gm = llfx.capture(model, inputs)
    made = type("Made", (torch.nn.Linear,), {"__module__": "nowhere"})(4, 4)  # no module of this name
    torch.testing.assert_close(llfx.capture(made, inputs)(*inputs), made(*inputs))
    torch.testing.assert_close(gm(*inputs), model(*inputs))


@functools.cache
def model_of_a_script(width: int) -> torch.nn.Module:
    return torch.nn.Linear(width, width)


def test_functions_that_a_model_does_not_call_keep_what_they_remember() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    kept = model_of_a_script(4)
    llfx.capture(Doubled(4, 4), (torch.randn(3, 4),))
    assert model_of_a_script(4) is kept


@pytest.mark.parametrize("name", broad_after(6, slow_after(20, ARGUMENTS)))
def test_a_model_runs_on_inputs_of_its_config(name: str) -> None:
    model = CASES[name].builder()()
    inputs = example_inputs_of(model)
    assert inputs.keys() == ARGUMENTS[name]
    with torch.no_grad():
        model(**inputs)


@pytest.mark.broad
def test_a_model_of_choices_is_captured_for_any_number_of_them() -> None:
    import transformers

    model = tiny_model(transformers.BertForMultipleChoice, {})
    gm = llfx.capture(model)
    ids = torch.randint(3, 90, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([2, 0])}
    torch.testing.assert_close(gm(**call).loss, model(**call).loss)


def test_a_capture_for_text_alone_is_warned_of() -> None:
    import transformers

    model = tiny_model(transformers.Gemma3ForConditionalGeneration, {})  # its images have fewer patches than tokens
    with pytest.warns(UserWarning, match="captured without images"):
        assert "pixel_values" not in example_inputs_of(model)


def test_a_capture_without_sound_is_warned_of() -> None:
    model = CASES["voxtral"].builder()()
    model.config.audio_token_id = None
    with pytest.warns(UserWarning, match="captured without sound.*audio_token_id of the config names no token"):
        assert example_inputs_of(model).keys() == {"input_ids", "attention_mask", "labels"}


def test_images_and_sound_by_other_names_are_warned_of() -> None:
    import transformers

    class OtherNames(transformers.LlamaForCausalLM):
        """Takes images and sound by names of its own, as Phi-4 does."""

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            labels: Any = None,
            image_pixel_values: Any = None,
            audio_input_features: Any = None,
        ) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    with pytest.warns(UserWarning, match="captured without") as warned:
        assert example_inputs_of(OtherNames(tiny_llama())).keys() == {"input_ids", "attention_mask", "labels"}
    told = [str(warning.message) for warning in warned]
    assert any("without images" in text and "'image_pixel_values'" in text for text in told), told
    assert any("without sound" in text and "'audio_input_features'" in text for text in told), told


def test_sound_that_comes_in_tokens_of_its_own_is_warned_of() -> None:
    import transformers

    class OwnTokens(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, audio_input_ids: Any = None, labels: Any = None) -> Any:
            return super().forward(input_ids=input_ids, labels=labels)

    with pytest.warns(UserWarning, match=r"captured without sound.*'audio_input_ids'"):
        assert example_inputs_of(OwnTokens(tiny_llama())).keys() == {"input_ids", "labels"}


class Reads(torch.nn.Module):
    """Decides by a value of what the images became."""

    def __init__(self, project: torch.nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, x: torch.Tensor) -> Any:
        return x if x.sum().item() > 1e9 else self.project(x)


@pytest.mark.slow
def test_a_model_whose_images_cannot_be_captured_is_captured_for_text_alone() -> None:
    model = CASES["llava"].builder()()
    model.model.multi_modal_projector = Reads(model.model.multi_modal_projector)
    with pytest.warns(UserWarning, match=r"captured without images.*images cannot be captured: .*x.sum\(\)"):
        gm = llfx.capture(model)
    inputs = example_inputs_of(model, without=("images",))
    torch.testing.assert_close(gm(**inputs).logits, model(**inputs).logits)
    with pytest.raises(llfx.CallError, match="pixel_values was not captured"):
        gm(**example_inputs_of(model))
    with pytest.raises(llfx.CaptureError, match=r"x.sum\(\)"):
        llfx.capture(model, example_inputs_of(model))


@pytest.mark.slow
def test_it_is_adapted_for_text_alone_too() -> None:
    model = CASES["llava"].builder()().eval()
    model.model.multi_modal_projector = Reads(model.model.multi_modal_projector)
    cfg = llfx.LoRA(r=2, target_names=(r"language_model.*q_proj",))
    with pytest.warns(UserWarning, match=r"captured without images.*cannot be captured: In a call with .*x.sum\(\)"):
        adapted = llfx.adapt(model, cfg)
    inputs = example_inputs_of(model, without=("images",))
    wrapped = llfx.wrap(llfx.capture(model, inputs), cfg)
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    torch.testing.assert_close(adapted(**inputs).logits, wrapped(**inputs).logits)
    with pytest.raises(llfx.CaptureError, match=r"pixel_values.*x.sum\(\)"):
        adapted(**example_inputs_of(model))


@pytest.mark.slow
def test_a_model_whose_sound_cannot_be_captured_is_captured_without() -> None:
    model = CASES["voxtral"].builder()()
    model.model.multi_modal_projector = Reads(model.model.multi_modal_projector)
    with pytest.warns(UserWarning, match=r"captured without sound.*sound cannot be captured: .*x.sum\(\)"):
        gm = llfx.capture(model)
    inputs = example_inputs_of(model, without=("sound",))
    torch.testing.assert_close(gm(**inputs).logits, model(**inputs).logits)
    with pytest.raises(llfx.CallError, match="input_features was not captured"):
        gm(**example_inputs_of(model))


@pytest.mark.parametrize("starts_at_zero", broad_after(1, [True, False]))
def test_a_model_that_computes_something_else_with_caches_is_refused(starts_at_zero: bool) -> None:
    model = CASES["fsmt"].builder()()
    model.config.use_cache = True
    if starts_at_zero:
        for layer in model.model.decoder.layers:
            torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    with pytest.raises(llfx.CaptureError, match=r"another logits with caches.*use_cache = False"):
        llfx.capture(model)


def test_a_config_without_what_is_needed_is_named() -> None:
    model = CASES["pi0"].builder()()
    with pytest.raises(llfx.CaptureError, match=r"PI0For.*It requires state.*pass example_inputs"):
        example_inputs_of(copy.deepcopy(model))


def test_a_config_that_is_a_part_of_itself_is_searched_once() -> None:
    class Endless(hf.PreTrainedConfig):
        made = 0

        @property
        def encoder_config(self) -> Endless:
            assert Endless.made < 100
            Endless.made += 1
            return Endless()

    model = SimpleNamespace(forward=lambda input_ids: None, config=Endless())
    assert Values(model).field("image_size", "max_img_size") is None


@pytest.mark.broad
def test_the_layout_of_images_is_a_part_of_the_graph() -> None:
    model = CASES["siglip2"].builder()()
    inputs: dict[str, Any] = example_inputs_of(model)
    gm = llfx.capture(model, inputs)
    torch.testing.assert_close(gm(**inputs).logits, model(**inputs).logits)
    other = {**inputs, "spatial_shapes": inputs["spatial_shapes"].flip(1)}
    with pytest.raises(llfx.CallError, match=r"spatial_shapes.*differs from.*captured with"):
        gm(**other)
    with pytest.raises(llfx.CallError, match="spatial_shapes is missing"):
        gm(**{name: value for name, value in inputs.items() if name != "spatial_shapes"})


@pytest.mark.slow
def test_compiled_and_traced_calls_check_the_layout_of_images_too() -> None:
    model = CASES["siglip2"].builder()()
    inputs: dict[str, Any] = example_inputs_of(model)
    gm = llfx.capture(model, inputs)
    other = {**inputs, "spatial_shapes": inputs["spatial_shapes"].flip(1)}
    expected = gm(**inputs).logits
    compiled: Any = torch.compile(gm, backend="aot_eager")
    traced: Any = make_fx(lambda inputs: gm(**inputs).logits, pre_dispatch=True)(inputs)
    either: list[Any] = [lambda inputs: compiled(**inputs).logits, traced]
    for logits in either:
        torch.testing.assert_close(logits(inputs), expected)
        with pytest.raises(RuntimeError, match=r"spatial_shapes.*differs from"):
            logits(other)


def test_what_a_graph_cannot_draw_is_refused_with_the_way_out() -> None:
    model = CASES["wavlm"].builder()()
    origin_of(model).prepare(model)
    model.config.apply_spec_augment, model.config.mask_time_prob = True, 0.05
    with pytest.raises(llfx.CaptureError, match=r"SpecAugment|numpy.*apply_spec_augment = False"):
        origin_of(model).prepare(model)
    model.config.apply_spec_augment, model.config.layerdrop = False, 0.1
    with pytest.raises(llfx.CaptureError, match=r"layerdrop = 0"):
        origin_of(model).prepare(model)


@pytest.mark.broad
def test_weights_that_training_clamps_are_captured_within_their_limits_alone() -> None:
    model = CASES["gemma3n_text"].builder()()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    site = "model.layers.0.altup.correction_coefs"
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=re.escape(site)))
    randomise(gm, 0)
    wrapped = wrap_again(gm, model)  # the model calls this site by its weight alone in training
    for training in (True, False):
        logits = [each.train(training)(**inputs).logits for each in (gm, wrapped)]
        torch.testing.assert_close(*logits)
    assert model.config.altup_coef_clip is not None
    with torch.no_grad():
        model.get_submodule(site).weight.fill_(2 * model.config.altup_coef_clip)
    with pytest.raises(llfx.CaptureError, match=rf"clamps {site}.weight in training.*The way out: clamp the weight"):
        llfx.capture(model)
