"""A graph remembers the model that it was made from: what needs that model works after it is let go."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.execution.optimize import execution_of
from tests.support.conformance import close, randomise
from tests.support.models import one_layer_llama, tiny_llama
from tests.support.selection import broad_after

IDS = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SIZES: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LORA = llfx.LoRA(r=2, target_roles=("query", "up"))


def tied_llama() -> Any:
    return hf.LlamaForCausalLM(tiny_llama(tie_word_embeddings=True))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    )


def bert() -> Any:
    config: Any = {"vocab_size": 32, "num_labels": 3, **SIZES}
    return hf.BertForSequenceClassification(hf.BertConfig(**config))


def t5() -> Any:
    config: Any = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, **config))


class Head(nn.Module):
    """A model without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + self.shift
        return y


CASES: dict[str, tuple[Callable[[], Any], llfx.Variant]] = {
    "Llama": (one_layer_llama, LORA),
    "a tied Llama with an adapted head": (tied_llama, llfx.LoRA(r=2, target_roles=("query", "head"))),
    "GPT-2": (gpt2, LORA),
    "a classifier": (bert, LORA),
    "T5": (t5, LORA),
}


def made(build: Callable[[], Any], cfg: Any = LORA) -> tuple[Any, Any]:
    """Return a model and a graph with adapters at random values."""
    torch.manual_seed(0)
    model = build().eval()
    gm = llfx.rewrite(model, cfg)
    randomise(gm, 0)
    return model, gm


def logits(model: Any) -> torch.Tensor:
    labels = {"labels": IDS} if getattr(model, "config", None) and model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(**TEXT, **labels).logits
    return result


def files(gm: Any, folder: Path) -> dict[str, bytes]:
    """Write what needs the model, and return the contents by name."""
    llfx.save_peft(gm, folder / "peft")
    llfx.merge(gm).save_pretrained(folder / "merged")
    if "Llama" in repr(gm) and "lm_head" not in repr(gm):
        llfx.save_gguf(gm, folder / "adapter.gguf")
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", broad_after(2, CASES))
def test_what_needs_the_model_works_after_it_is_let_go(name: str, tmp_path: Path) -> None:
    model, gm = made(*CASES[name])
    cls, of_model = type(model), weakref.ref(model)
    with_model = files(gm, tmp_path / "with")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ties = {name for name, tensor in model.named_parameters(remove_duplicate=False)} - dict(
        model.named_parameters()
    ).keys()
    expected = logits(llfx.adapt(model, str(tmp_path / "with" / "peft")))
    del model
    gm = copy.deepcopy(gm)
    gc.collect()
    assert of_model() is None
    assert files(gm, tmp_path / "without") == with_model
    close(logits(cls.from_pretrained(tmp_path / "without" / "merged").eval()), expected, 1e-5, "merged")

    chat: Any = llfx.adapt(gm)
    assert isinstance(chat, cls)
    assert not chat.training
    close(logits(chat), expected, 1e-6, "adapted")
    assert {id(p) for p in llfx.adapter_parameters(chat)} == {id(p) for p in llfx.adapter_parameters(gm)}
    in_memory = {tensor.data_ptr() for tensor in gm.parameters()}
    assert all(tensor.data_ptr() in in_memory for tensor in chat.parameters())
    assert not {name for name, _ in chat.named_parameters()} & ties, "ties are kept"
    for name, buffer in chat.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    if chat.can_generate():
        generated = chat.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        merged = llfx.merge(chat).generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, merged)


def loaded(gm: Any, file: Path) -> Any:
    llfx.save(gm, file)
    return llfx.load(llfx.remove(gm), file)


DERIVED: dict[str, Callable[[Any, Path], Any]] = {
    "rewritten": lambda gm, _: llfx.rewrite(llfx.capture(llfx.remove(gm)), LORA),
    "merged": lambda gm, _: llfx.rewrite(llfx.merge(gm), LORA),
    "loaded": loaded,
    "optimized": lambda gm, _: llfx.optimize(gm, llfx.passes.Pipeline(())),
    "added": lambda gm, _: (llfx.add(gm, {"other": LORA}), gm)[1],
}


@pytest.mark.parametrize("name", broad_after(2, DERIVED))
def test_graphs_that_are_made_of_a_graph_remember_the_model_too(name: str, tmp_path: Path) -> None:
    gm = made(tied_llama, llfx.LoRA(r=2, target_roles=("query", "head")))[1]
    gc.collect()
    derived = DERIVED[name](gm, tmp_path / "adapter.safetensors")
    randomise(derived, 1)
    expected = derived(**TEXT).logits.detach()
    close(logits(llfx.adapt(derived)), expected, 1e-6, name)
    llfx.merge(derived).save_pretrained(tmp_path / "merged")
    close(logits(hf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, 1e-4, name)


def test_a_graph_holds_its_model_without_the_weights_and_as_it_was() -> None:
    model, gm = made(one_layer_llama)
    made_from = execution_of(gm).made_from
    assert made_from is not None
    assert all(parameter.is_meta for parameter in made_from.skeleton.parameters())
    model.config.rms_norm_eps = 1.0
    model.generation_config.max_new_tokens = 3
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    chat: Any = llfx.adapt(gm)
    assert chat.config.rms_norm_eps != 1.0
    assert chat.generation_config.max_new_tokens != 3
    close(logits(chat), gm(**TEXT).logits.detach(), 1e-6, "as the graph computes")


def test_a_weight_that_the_graph_does_not_read_is_the_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = one_layer_llama().eval()
    model.unread = nn.Linear(4, 4)
    gm = llfx.rewrite(model, LORA)
    chat: Any = llfx.adapt(gm)
    assert chat.unread.weight.data_ptr() == model.unread.weight.data_ptr()
    del model, chat
    gc.collect()
    calls: list[Callable[[], Any]] = [
        lambda: llfx.adapt(gm),
        lambda: llfx.merge(gm).save_pretrained(tmp_path / "merged"),
    ]
    for call in calls:
        with pytest.raises(llfx.AdapterError, match=r"unread.weight.*llfx.adapt\(model, 'adapter.safetensors'\)"):
            call()
    assert not (tmp_path / "merged").exists()


def test_a_graph_that_remembers_no_model_says_the_way_out() -> None:
    gm = made(one_layer_llama)[1]
    exported = torch.export.export(gm, (), TEXT).module()
    with pytest.raises(llfx.AdapterError, match=r"does not remember.*llfx.adapt\(model, 'adapter.safetensors'\)"):
        llfx.adapt(exported)
    with pytest.raises(llfx.AdapterError, match=r"adapt takes a model of transformers or diffusers, not"):
        llfx.adapt(llfx.rewrite(Head(), llfx.LoRA(r=2, target_names="linear")))


def test_a_plain_module_is_wrapped_after_it_is_let_go() -> None:
    x = torch.randn(2, 4)
    base = llfx.capture(Head(), (x,))
    gc.collect()
    torch.testing.assert_close(llfx.wrap(base, llfx.LoRA(r=2, target_names="linear"))(x), base(x))


def test_buffers_that_training_has_moved_are_those_of_the_adapted_model() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    images = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    gm = llfx.rewrite(hf.ResNetForImageClassification(config), llfx.LoRA(r=2, target_kinds=("conv",)), images)
    gc.collect()
    name = "resnet.embedder.embedder.normalization.running_mean"
    before = llfx.remove(gm).get_buffer(name).clone()
    gm.train()(**images)
    chat: Any = llfx.adapt(gm)
    assert chat.get_buffer(name) is gm.get_buffer(name)
    assert torch.equal(llfx.remove(chat).get_buffer(name), before)
    assert torch.equal(llfx.merge(chat).get_buffer(name), gm.get_buffer(name))
    assert not torch.equal(gm.get_buffer(name), before)
