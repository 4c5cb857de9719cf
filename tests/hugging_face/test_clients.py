"""Libraries that call an adapted model by their own code: sentence-transformers and diffusers, as the eager wrapper."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

import lora_lite_fx as llfx
from tests.hugging_face.trainers import PROMPTS, WORDS, tokenizer
from tests.support.conformance import randomise
from tests.support.diffusers_models import INPUTS, unet

CONFIG = llfx.LoRA(r=2, target_roles=("attention",))


# sentence-transformers.


def encoder(folder: Path) -> Any:
    """Return an encoder that takes the mean over tokens of a BERT of one layer."""
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    fields: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": WORDS}
    fields |= {"num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hf.BertModel(hf.BertConfig(**fields)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    body = modules.Transformer(str(folder), model_kwargs={"dtype": torch.float64})
    return st.SentenceTransformer(modules=[body, modules.Pooling(16, "mean")], device="cpu")


@pytest.mark.broad
def test_an_encoder_of_sentence_transformers_trains_and_encodes_as_the_wrapper(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    base = encoder(tmp_path / "base")
    base[0].model.requires_grad_(False)
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    models[0][0].model = llfx.adapt(base[0].model, CONFIG)
    models[1][0].model = llfx.wrap(base[0].model, CONFIG)
    randomise(models[0][0].model, 0)
    llfx.load_adapter_state_dict(models[1][0].model, llfx.adapter_state_dict(models[0][0].model))
    start = llfx.adapter_state_dict(models[0][0].model)
    start = {name: tensor.clone() for name, tensor in start.items()}
    for model in models:
        arguments = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = Dataset.from_list([{"a": PROMPTS[i], "b": PROMPTS[i + 1]} for i in range(12)])
        loss = MultipleNegativesRankingLoss(model)
        st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    ours, theirs = (llfx.adapter_state_dict(model[0].model) for model in models)
    assert any(not torch.allclose(ours[name], start[name], rtol=1e-3) for name in start)
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor)
    encoded = [model.encode(PROMPTS[:5], convert_to_tensor=True) for model in models]
    assert_close(*encoded)
    assert not torch.allclose(encoded[0], base.encode(PROMPTS[:5], convert_to_tensor=True))


# diffusers.


@functools.cache
def pair() -> tuple[Any, Any]:
    """Return an adapted UNet and the eager wrapper, with the same adapters."""
    base = unet()
    adapted, wrapped = llfx.adapt(base, CONFIG, example_inputs=INPUTS), llfx.wrap(base, CONFIG, INPUTS)
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    return adapted, wrapped


@pytest.mark.broad
def test_an_adapted_unet_equals_the_wrapper_in_the_calls_of_training_and_of_pipelines() -> None:
    pytest.importorskip("diffusers")
    adapted, wrapped = pair()
    generator = torch.Generator().manual_seed(0)
    larger = {
        "sample": torch.randn(3, 4, 16, 8, generator=generator).double(),
        "timestep": torch.tensor([1, 2, 900]),
        "encoder_hidden_states": torch.randn(3, 4, 8, generator=generator).double(),
    }
    for arguments in (INPUTS, larger, {**INPUTS, "timestep": torch.tensor(7)}, {**INPUTS, "timestep": 9}):
        ours, theirs = adapted(**arguments), wrapped(**arguments)
        assert type(ours) is type(theirs)
        assert_close(ours.sample, theirs.sample)
        (as_tuple,) = adapted(**arguments, return_dict=False)
        assert_close(as_tuple, theirs.sample)
    assert len(adapted.graphs) == 2, "a timestep that is a number is one tensor for each number"
    gradients = []
    for model in (adapted, wrapped):
        model.zero_grad()
        model(**INPUTS).sample.square().sum().backward()
        parameters = dict(model.named_parameters())
        gradients.append({name: parameters[name].grad for name in llfx.adapter_state_dict(adapted)})
    assert_close(*gradients)


@pytest.mark.broad
def test_a_pipeline_asks_an_adapted_unet_for_what_it_is_and_draws_with_its_adapters() -> None:
    diffusers = pytest.importorskip("diffusers")
    adapted, wrapped = pair()
    assert isinstance(adapted, diffusers.UNet2DConditionModel)
    assert (adapted.dtype, adapted.device) == (torch.float64, torch.device("cpu"))
    assert adapted.config.cross_attention_dim == 8
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).double()
    drawn = []
    for model in (adapted, wrapped):
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=model,
            scheduler=diffusers.DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        text = INPUTS["encoder_hidden_states"]
        images = pipeline(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            height=8,
            width=8,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        drawn.append(images)
    assert_close(*drawn)


def test_what_would_pass_by_the_adapters_is_refused_or_captured_anew() -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(llfx.CaptureError, match=r"example_inputs=\{'sample': \.\.\., 'timestep': \.\.\."):
        llfx.adapt(unet(), CONFIG)
    adapted, wrapped = pair()
    with pytest.raises(llfx.AdapterError, match="scales layers of PEFT"):
        adapted(**INPUTS, cross_attention_kwargs={"scale": 0.5})
    assert_close(adapted(**INPUTS, cross_attention_kwargs={"scale": 1.0}).sample, wrapped(**INPUTS).sample)
    with pytest.raises(llfx.AdapterError, match="Fuse the projections before adapt"):
        adapted.fuse_qkv_projections()
    adapted.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    wrapped.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_close(adapted(**INPUTS).sample, wrapped(**INPUTS).sample)
    adapted.disable_freeu()
    wrapped.disable_freeu()
    assert_close(adapted(**INPUTS).sample, wrapped(**INPUTS).sample)


@pytest.mark.broad
def test_a_trainer_takes_an_adapted_model_whose_base_was_quantized() -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    base = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=WORDS
        )
    )
    base.is_quantized = True  # type: ignore[assignment]  # as a model of a GGUF file has it
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    adapted = llfx.adapt(base, CONFIG)
    validate_quantization_for_training(adapted)
    assert llfx.remove(adapted).is_quantized
