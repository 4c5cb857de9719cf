"""A merged graph is saved as the model's own files, and so is a model from GGUF: what is loaded computes the same."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx import ParamSpec
from lora_lite_fx.testing.comparisons import close
from tests.storage.test_merge import quantized_llama
from tests.support.models import tiny_llama
from tests.support.own_variants import registered
from tests.support.selection import broad_after, slow_after

IDS = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
SIZES: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def moved(model: Any, size: float = 0.2) -> Any:
    """Give all adapters random values, far from those they start with."""
    generator = torch.Generator().manual_seed(1)
    state = llfx.adapter_state_dict(model)
    random = {
        name: (size * torch.randn(tensor.shape, generator=generator)).to(tensor) for name, tensor in state.items()
    }
    llfx.load_adapter_state_dict(model, random)
    return model


def llama(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    model: Any = hf.LlamaForCausalLM(tiny_llama(**fields))
    return model.to(dtype).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    )


def mixtral() -> Any:
    torch.manual_seed(0)
    experts: Any = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=50, **SIZES, **experts))


def bert() -> Any:
    torch.manual_seed(0)
    model: Any = hf.BertForMaskedLM(hf.BertConfig(vocab_size=50, **SIZES))
    torch.nn.init.normal_(model.cls.predictions.bias)  # which is tied too, and starts as zeros
    return model


def vit() -> Any:
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, **SIZES))


def bart() -> Any:
    torch.manual_seed(0)
    layers: Any = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads: Any = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return hf.BartForConditionalGeneration(hf.BartConfig(d_model=32, vocab_size=50, **layers, **heads))


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs).logits
    return result


CASES: dict[str, tuple[Callable[[], Any], llfx.Variant, dict[str, Tensor]]] = {
    "tied, adapted head": (
        lambda: llama(tie_word_embeddings=True),
        llfx.LoRA(r=2, target_roles=("head", "value")),
        TEXT,
    ),
    "experts": (mixtral, llfx.LoRA(r=2, target_kinds=("experts",)), TEXT),
    "an image model": (vit, llfx.DoRA(r=2), IMAGES),
    "tied": (lambda: llama(tie_word_embeddings=True), llfx.LoRA(r=2), TEXT),
    "tied, adapted embedding": (
        lambda: llama(tie_word_embeddings=True),
        llfx.LoRA(r=2, target_kinds=("embedding",)),
        TEXT,
    ),
    "Conv1D": (gpt2, llfx.LoRA(r=2), TEXT),
    "a tied bias": (bert, llfx.LoRA(r=2, target_roles=("head", "query")), TEXT),
    "several ties": (bart, llfx.LoRA(r=2, target_roles=("head",)), {**TEXT, "labels": IDS.clone()}),
}


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(3, CASES))
def test_a_merged_graph_is_saved_as_its_model(name: str, tmp_path: Path) -> None:
    build, cfg, inputs = CASES[name]
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm = moved(llfx.rewrite(model, cfg, inputs if {"pixel_values", "labels"} & inputs.keys() else None))
    merged = llfx.merge(gm)
    merged.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2, "several shards"
    loaded = type(model).from_pretrained(tmp_path / "merged")
    close(outputs(loaded, inputs), outputs(merged, inputs), 1e-5, name)
    close(outputs(loaded, inputs), outputs(gm, inputs), 1e-4, name)
    assert (outputs(loaded, inputs) - outputs(model, inputs)).abs().max() > 1e-2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.broad
def test_what_is_saved_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 3
    merged = llfx.merge(moved(llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("head", "up")))))
    merged.save_pretrained(tmp_path / "merged")
    torch.save(IDS, tmp_path / "ids.pt")
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('merged')\n"
        "ids = torch.load('ids.pt')\n"
        "assert model.generation_config.max_new_tokens == 3\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, 'y.pt')\n"
        "assert 'lora_lite_fx' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
    close(torch.load(tmp_path / "y.pt"), outputs(merged, TEXT), 1e-5, "loaded")


def gguf_folder(path: Path) -> Path:
    """Write a tiny Llama as a GGUF file of dense tensors."""
    gguf: Any = pytest.importorskip("gguf")
    config = tiny_llama(tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in llama(tie_word_embeddings=True).state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.broad
@pytest.mark.parametrize("adapted", broad_after(1, [True, False]))
def test_a_base_from_gguf_can_be_saved_merged(adapted: bool, tmp_path: Path) -> None:
    folder = gguf_folder(tmp_path)
    model: Any = hf.LlamaForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    cfg = llfx.LoRA(r=2)
    chat = moved(llfx.adapt(model, cfg) if adapted else llfx.rewrite(model, cfg))
    merged = llfx.merge(chat)
    merged.save_pretrained(tmp_path / "merged")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(outputs(loaded, TEXT), outputs(merged, TEXT), 1e-5, "loaded")
    close(outputs(loaded, TEXT), outputs(chat, TEXT), 1e-4, "loaded")
    assert getattr(loaded.config, "quantization_config", None) is None
    llfx.remove(chat).save_pretrained(tmp_path / "removed")
    close(outputs(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "removed"), TEXT), outputs(model, TEXT), 0, "base")


@pytest.mark.broad
def test_a_quantized_base_has_dense_weights_where_adapters_were(tmp_path: Path) -> None:
    model = quantized_llama("nf4", tmp_path / "base")
    gm = moved(llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("up", "query"))), 0.1)
    merged = llfx.merge(gm)
    merged.save_pretrained(tmp_path / "merged")
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].mlp.down_proj) is type(model.model.layers[0].mlp.down_proj)
    # Modules of four bits compute in a way of their own, from which a graph differs in the third digit.
    close(outputs(loaded, TEXT), outputs(llfx.merge(llfx.adapt(gm)), TEXT), 1e-5, "loaded")
    close(outputs(loaded, TEXT), outputs(merged, TEXT), 1e-2, "loaded")
    with pytest.raises(llfx.AdapterError, match=r"quantized, and not the one .*llfx.merge\(llfx.adapt\(graph\)"):
        copy.deepcopy(llfx.merge(gm, requantise=True)).save_pretrained(tmp_path / "again")
    del model.config.quantization_config
    with pytest.raises(llfx.AdapterError, match="the config of LlamaForCausalLM does not say so"):
        llfx.merge(llfx.rewrite(model, llfx.LoRA(r=2, target_roles=("up",)))).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.broad
def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    merged = llfx.merge(moved(llfx.rewrite(model, llfx.LoRA(r=2))))
    merged.save_pretrained(tmp_path)  # which is there, and empty
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = dict(merged.named_parameters())
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.named_parameters())


@pytest.mark.broad
def test_statistics_and_a_second_round_are_saved(tmp_path: Path) -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model: Any = hf.ResNetForImageClassification(config).eval()
    gm = moved(llfx.rewrite(model, llfx.LoRA(r=2, target_kinds=("conv",)), IMAGES))
    gm.train()
    gm(**IMAGES)
    again = moved(llfx.rewrite(llfx.merge(gm), llfx.LoRA(r=2, target_kinds=("conv",))), 0.1)
    merged = copy.deepcopy(llfx.merge(again))
    merged.save_pretrained(tmp_path / "merged")
    loaded = hf.ResNetForImageClassification.from_pretrained(tmp_path / "merged")
    close(outputs(loaded, IMAGES), outputs(again, IMAGES), 1e-4, "loaded")
    mean = "resnet.embedder.embedder.normalization.running_mean"
    assert torch.equal(loaded.get_buffer(mean), gm.get_buffer(mean))
    assert not torch.equal(loaded.get_buffer(mean), model.get_buffer(mean))


@dataclass(frozen=True, kw_only=True)
class Shift(llfx.Variant):
    """Adds a vector, and so a bias."""

    def params(self, site: Any) -> dict[str, ParamSpec]:
        return {"c": ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: Any, p: Any) -> Tensor:
        result: Tensor = base(x) + p.c
        return result


@pytest.mark.broad
def test_a_bias_that_the_class_lacks_is_not_lost_silently(tmp_path: Path) -> None:
    model = llama()
    with registered(Shift):
        gm = moved(llfx.rewrite(model, Shift(target_roles=("query",))))
        with pytest.raises(llfx.AdapterError, match=r"a bias at model.layers.0.self_attn.q_proj, .* has none there"):
            llfx.merge(gm).save_pretrained(tmp_path / "merged")
        with pytest.warns(UserWarning, match=r"biases that its class has not"):
            llfx.merge(moved(llfx.adapt(model, Shift(target_roles=("query",)))))
    assert not (tmp_path / "merged").exists()


@pytest.mark.broad
def test_mistakes_are_told(tmp_path: Path) -> None:
    model = llama()
    gm: Any = llfx.rewrite(model, llfx.LoRA(r=2))
    assert not hasattr(gm, "save_pretrained")
    with pytest.raises(AttributeError, match=r"llfx.merge\(graph\).save_pretrained\(folder\)"):
        gm.save_pretrained(tmp_path)
    merged = llfx.merge(gm)
    (tmp_path / "file").touch()
    with pytest.raises(llfx.CheckpointError, match="is not a folder"):
        merged.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError):
        merged.save_pretrained(tmp_path / "merged", max_shard_size=None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left of what failed"
    plain = llfx.merge(llfx.rewrite(torch.nn.Sequential(torch.nn.Linear(4, 4)), llfx.LoRA(r=2, target_names="0")))
    assert not hasattr(plain, "save_pretrained")
