"""The backend on models of transformers: by role, in pieces, and in generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.torch_compile.backend import backend
from tests.sites.test_architectures import ARCHITECTURES, outputs_and_gradients, target_roles
from tests.support.conformance import close, output, randomise
from tests.support.selection import broad_after, slow_unless
from tests.support.untouched import untouched
from tests.torch_compile.test_backend import _fresh, eager_of  # noqa: F401

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
SIZES["num_attention_heads"] = 2


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(sum(shape)))


def deberta() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
    batch = {"input_ids": ids(2, 5), "labels": torch.tensor([0, 1])}
    return transformers.DebertaV2ForSequenceClassification(config), batch


def wav2vec2() -> tuple[Any, dict[str, Tensor]]:
    convolutions: dict[str, Any] = {
        "conv_dim": (8, 8),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
    }
    config = transformers.Wav2Vec2Config(
        **SIZES, **convolutions, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0
    )
    batch = {"input_values": torch.randn(2, 200), "labels": ids(2, 3)}
    return transformers.Wav2Vec2ForCTC(config), batch


def dynamic_rope() -> tuple[Any, dict[str, Tensor]]:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope)), causal()


def eager_experts() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    model: Any = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model, causal()


def gpt2() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), causal()


def causal() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 5), "labels": ids(2, 5)}


@pytest.mark.broad
@pytest.mark.parametrize(
    "build",
    broad_after(1, slow_unless((deberta, gpt2).__contains__, [deberta, wav2vec2, dynamic_rope, eager_experts, gpt2])),
    ids=lambda f: f.__name__,
)
def test_a_model_that_export_refuses_computes_what_the_eager_wrapper_does(build: Any) -> None:
    """Adapt models by role although they come in pieces. Export refuses all but GPT-2 with these inputs."""
    model, batch = build()
    model.eval().requires_grad_(False)
    adapting = backend(llfx.LoRA(r=2, target_roles=("query", "output", "down")), inner="eager")
    with untouched(model):
        base = model(**batch)
        carrier = adapting.adapt(model, **batch)
        fast: Any = torch.compile(carrier, backend=adapting)
        close(fast(**batch).logits, base.logits, 1e-6, "identity at start")
        randomise(carrier, 0)
        y, expected = fast(**batch), eager_of(carrier)(**batch)
    close(y.logits, expected.logits, 1e-6, "logits")
    close(y.loss, expected.loss, 1e-6, "loss")
    assert (y.logits - base.logits).abs().max() > 1e-4


@pytest.mark.broad
def test_generation_is_that_of_the_eager_wrapper() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2}, num_key_value_heads=1, pad_token_id=0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.eval()
    cfg = llfx.LoRA(r=2, target_roles=("attention", "mlp"))
    prompt = {"input_ids": ids(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])}
    settings = {"max_new_tokens": 6, "do_sample": False}
    wrapped: Any = llfx.wrap(model, cfg)
    randomise(wrapped, 0)
    expected = wrapped.generate(**prompt, **settings)
    assert not torch.equal(expected, model.generate(**prompt, **settings))
    carrier: Any = backend(cfg, inner="eager").adapt(model, **prompt)
    carrier.forward = torch.compile(carrier.forward, backend=backend(inner="eager"))
    assert isinstance(carrier, transformers.LlamaForCausalLM)
    llfx.load_adapter_state_dict(carrier, llfx.adapter_state_dict(wrapped))
    assert torch.equal(carrier.generate(**prompt, **settings), expected)
    close(output(carrier, (ids(2, 4),)), output(wrapped, (ids(2, 4),)), 1e-6, "logits")


def test_the_error_of_adapt_points_to_the_backend() -> None:
    class ReadsValues(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **arguments: Any) -> Any:
            return super().forward(input_ids, **arguments) if len(input_ids.unique().tolist()) else None

    model = ReadsValues(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))
    with untouched(model), pytest.raises(llfx.CaptureError, match=r"(?s)In a call with .*The way out.*backend\(cfg\)"):
        llfx.adapt(model, llfx.LoRA(r=2))


# One architecture draws random decisions in training, and the code of another is another under torch.compile.


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(("swin",).__contains__, ["swin", "mamba"]))
def test_an_architecture_computes_what_the_eager_wrapper_does(name: str) -> None:
    """Compare outputs and gradients, in both modes and at other shapes."""
    architecture = ARCHITECTURES[name]
    model = architecture.build().requires_grad_(False)
    inputs = example_inputs_of(copy.deepcopy(model))
    fewer = {key: (t[:2, :-2] if t.dim() == 2 else t[:2]).contiguous() for key, t in inputs.items()}
    model(**inputs)  # so that the model notes in its config which kind of labels these are
    adapting = backend(llfx.LoRA(r=2, target_roles=target_roles(architecture)), inner="eager")
    with untouched(model):
        carrier = adapting.adapt(model, **inputs)
        fast: Any = torch.compile(carrier, backend=adapting)
        randomise(carrier, 0)
        reference = eager_of(carrier)
        for training, batch in ((False, inputs), (False, fewer), (True, fewer)):
            carrier.train(training), reference.train(training)
            carrier.zero_grad()
            actual, _ = outputs_and_gradients(fast, batch)
            gradients = {key: p.grad for key, p in carrier.named_parameters() if p.grad is not None}
            expected, expected_gradients = outputs_and_gradients(reference, batch)
            assert actual.keys() == expected.keys()
            assert gradients.keys() == expected_gradients.keys() == llfx.adapter_state_dict(carrier).keys()
            for key, value in actual.items():
                close(value, expected[key], 1e-9, f"{key}, training={training}")
            for key, value in gradients.items():
                close(value, expected_gradients[key], 1e-9, f"gradient of {key}, training={training}")
