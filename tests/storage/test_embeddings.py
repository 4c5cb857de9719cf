"""Embeddings whose rows are stored quantized: frozen and kept, beside adapters of linears."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.shared_copy import shared_copy
from lora_lite_fx.storage.dequantized import restore_quantized
from lora_lite_fx.testing.comparisons import close
from tests.storage.test_merge import moved
from tests.support.models import tiny_llama
from tests.support.quantized import library
from tests.support.selection import slow_unless

IDS = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(0))
CFG = llfx.LoRA(r=2, target_names="up")


class Net(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.up, self.head = embed, nn.Linear(128, 32), nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.up(self.embed(ids))))
        return y


def _torchao(config: Callable[[Any], Any], embed: nn.Module) -> nn.Module:
    torchao, holder = library("torchao.quantization"), nn.Sequential(embed)
    torchao.quantize_(holder, config(torchao), filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    return holder[0]


def _bitsandbytes(kind: str, embed: nn.Module) -> nn.Module:
    module: Any = getattr(library("bitsandbytes").nn, kind)(embed.num_embeddings, embed.embedding_dim)
    module.load_state_dict(embed.state_dict())
    return module.to("cpu")  # type: ignore[no-any-return]


def _groups(torchao: Any) -> Any:
    int4 = getattr(torch, "int4")  # noqa: B009  # which its stubs lack
    return torchao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=torchao.PerGroup(32))


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": lambda embed: _torchao(lambda torchao: torchao.Int8WeightOnlyConfig(), embed),
    "torchao int4": lambda embed: _torchao(_groups, embed),
    "nf4": lambda embed: _bitsandbytes("EmbeddingNF4", embed),
    "fp4": lambda embed: _bitsandbytes("EmbeddingFP4", embed),
    "int8": lambda embed: _bitsandbytes("Embedding8bit", embed),
}


def quantized(kind: str, width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](nn.Embedding(50, width)).requires_grad_(False)


def nets(kind: str) -> tuple[nn.Module, nn.Module]:
    """Return a net with a quantized embedding, and one with the dense rows that its library reads."""
    model = Net(quantized(kind)).requires_grad_(False)
    dense = Net(nn.Embedding(50, 128)).requires_grad_(False)
    dense.embed.weight.copy_(model.embed(torch.arange(50)))  # type: ignore[operator]
    for name in ("up", "head"):
        dense.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    return model, dense


PATHS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "exported": lambda model: llfx.rewrite(model, CFG, (IDS,)),
    "traced": lambda model: llfx.rewrite(model, CFG),
    "wrap": lambda model: llfx.wrap(model, CFG),
    "backend": lambda model: llfx.backend(CFG, inner="eager").adapt(model, IDS),
}


@pytest.mark.broad
@pytest.mark.parametrize("kind", slow_unless(("torchao int4", "nf4").__contains__, KINDS))
def test_adapters_beside_it_compute_and_train_as_beside_the_dense_rows(kind: str) -> None:
    torch._dynamo.reset()
    model, dense = nets(kind)
    expected = moved(llfx.wrap(dense, CFG))
    expected(IDS).square().sum().backward()
    gradients = {name: expected.get_parameter(name).grad for name in llfx.adapter_state_dict(expected)}
    for path, adapt in PATHS.items():
        adapted = moved(adapt(model))
        y = (torch.compile(adapted, backend="lora_lite_fx") if path == "backend" else adapted)(IDS)
        close(y, expected(IDS), 1e-6, path)
        y.square().sum().backward()
        for name, gradient in gradients.items():
            close(adapted.get_parameter(name).grad, gradient, 1e-5, f"{path}, {name}")
        held = {name: tensor for name, tensor in adapted.named_parameters() if name.startswith("embed.")}
        assert sum(tensor.nbytes for tensor in held.values()) < dense.get_parameter("embed.weight").nbytes / 2


@pytest.mark.parametrize("kind", slow_unless("nf4".__eq__, KINDS))
def test_it_is_exported_and_comes_back_quantized(kind: str) -> None:
    model, dense = nets(kind)
    gm = moved(llfx.rewrite(model, CFG, (IDS,)))
    file = io.BytesIO()
    torch.export.save(torch.export.export(gm.eval(), (IDS,)), file)
    file.seek(0)
    close(torch.export.load(file).module()(IDS), gm(IDS), 1e-6, "loaded")
    close(llfx.merge(gm)(IDS), gm(IDS), 1e-5, "merged")
    close(llfx.remove(gm)(IDS), dense(IDS), 1e-6, "removed")
    again = shared_copy(model)
    restore_quantized(again)
    assert type(again.embed) is type(model.embed)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("kind", slow_unless("nf4".__eq__, KINDS))
def test_what_adapts_its_rows_is_refused(kind: str) -> None:
    model, _ = nets(kind)
    cfg = llfx.TrainableTokens(target_names="embed", token_indices=(1, 2))
    for adapt in (llfx.rewrite, llfx.wrap):
        with pytest.raises(llfx.SelectionError, match=r"embed \(embedding whose rows are stored quantized\)"):
            adapt(model, cfg, (IDS,))


@pytest.mark.broad
def test_a_language_model_with_it_is_adapted_and_generates() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny_llama(hidden_size=64, intermediate_size=64)).eval().requires_grad_(False)
    dense = copy.deepcopy(model)
    model.set_input_embeddings(_bitsandbytes("EmbeddingNF4", model.get_input_embeddings()))
    dense.get_input_embeddings().weight.copy_(model.get_input_embeddings()(torch.arange(model.config.vocab_size)))
    chat, other = (moved(llfx.adapt(each, llfx.LoRA(r=2, target_roles=("up",)))) for each in (model, dense))
    made = chat.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(made, other.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert type(llfx.remove(chat).get_input_embeddings()) is type(model.get_input_embeddings())


def test_tables_that_cannot_be_read_row_by_row_are_refused() -> None:
    with pytest.raises(llfx.ConfigError, match=r"EmbeddingNF4 .* blocks of 64 cross its rows of 96"):
        llfx.rewrite(nn.Sequential(quantized("nf4", 96), nn.Linear(96, 8)), llfx.LoRA(r=2, target_names="1"))
    module = library("bitsandbytes").nn.EmbeddingNF4(50, 64)
    with pytest.raises(llfx.ConfigError, match=r"EmbeddingNF4 .* is not quantized yet.*model\.to"):
        llfx.rewrite(nn.Sequential(module, nn.Linear(64, 8)), llfx.LoRA(r=2, target_names="1"))
