"""Whole weights beside adapters: `Full`, and `TrainableTokens`, which trains rows of one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import close, unchanged
from lora_lite_fx.testing.graphs import check_export, check_file
from tests.support.models import tiny_llama
from tests.support.selection import broad_after

VOCABULARY = 32
IDS = torch.tensor([[3, 7, 9, 3, 11], [5, 7, 2, 1, 4]])
MASK = torch.ones_like(IDS)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _llama(tied: bool) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(tiny_llama(**fields, tie_word_embeddings=tied, attention_bias=True))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tied=False),
    "tied llama": lambda: _llama(tied=True),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
}


@functools.cache
def captured(name: str) -> tuple[Any, fx.GraphModule]:
    """Return a model in double precision and its graph."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # biases and norms start at values that hide mistakes
    return model, llfx.capture(model, {"input_ids": IDS, "attention_mask": MASK})


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return y


def moved(*models: nn.Module) -> dict[str, Tensor]:
    """Give the adapters of all models the same values, away from the start, and return them."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator).to(value)
        if value.is_floating_point()
        else value
        for name, value in llfx.adapter_state_dict(models[0]).items()
    }
    for model in models:
        llfx.load_adapter_state_dict(model, state)
    return state


LORA = llfx.LoRA(r=2)
TOKENS = llfx.TrainableTokens(token_indices=(3, 7, 30), target_names="(embed_tokens|wte)$")
CONFIGS: dict[str, tuple[str, Any]] = {
    "a head": ("llama", [LORA, llfx.Full(target_names="lm_head")]),
    "a head by role": ("llama", [LORA, llfx.Full()]),
    "a tied head": ("tied llama", [LORA, llfx.Full(target_names="lm_head")]),
    "a tied embedding": ("tied llama", [LORA, llfx.Full(target_names="embed_tokens")]),
    "everything": ("bert", llfx.Full(target_names=".")),
    "a weight inside an adapter": ("llama", [llfx.Full(target_names="q_proj"), LORA]),
    "Conv1D and positions": ("gpt2", [llfx.Full(target_names=("c_attn", "wpe")), LORA]),
    "the norms": ("llama", llfx.Full(target_kinds="norm")),
    "the norms of an encoder": ("bert", llfx.Full(target_kinds="norm")),
    "the biases": ("gpt2", llfx.Full(weight=False, target_names=".")),
    "tokens": ("llama", [TOKENS, LORA]),
    "tied tokens": ("tied llama", [TOKENS, LORA]),
}
SITES = {
    "a head by role": {"lm_head"},
    "the norms": {"model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"},
    "tokens": {"model.embed_tokens"},
    "tied tokens": {"model.embed_tokens", "lm_head"},
}


@pytest.mark.parametrize("name", broad_after(2, CONFIGS))
def test_it_equals_the_wrapper_and_is_merged_and_removed(name: str) -> None:
    case, cfg = CONFIGS[name]
    model, base = captured(case)
    with unchanged(model):
        gm, wrapped = llfx.rewrite(base, cfg), llfx.wrap(base, cfg)
        assert torch.equal(logits(gm), logits(base)), "the start"
        own = next(row for row in llfx.adapters(gm) if row.variant in ("Full", "TrainableTokens"))
        if name in SITES:
            assert {site.name for site in own.sites} == SITES[name]
        state = moved(gm, wrapped)
        assert not torch.allclose(logits(gm), logits(base), atol=1e-2)
        for ids in (IDS, IDS[:1, :3]):
            close(logits(gm, ids), logits(wrapped, ids), 1e-12, "output")
        (y, grads), (expected_y, expected) = _gradients(gm), _gradients(wrapped)
        close(y, expected_y, 1e-12, "output in training")
        assert grads.keys() == expected.keys() == {n for n in state if state[n].is_floating_point()}
        for key, grad in grads.items():
            close(grad, expected[key], 1e-9, key)
        merged, removed = llfx.merge(gm), llfx.remove(gm)
        close(logits(merged), logits(gm), 1e-12, "merged")
        assert [str(node) for node in removed.graph.nodes] == [str(node) for node in base.graph.nodes]
        assert all(torch.equal(a, b) for a, b in zip(removed.parameters(), base.parameters(), strict=True))
        assert torch.equal(logits(removed), logits(base))


def _gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(1, ["everything", "Conv1D and positions", "a tied head"]))
def test_merge_gives_the_trained_tensors_bit_for_bit(name: str) -> None:
    case, cfg = CONFIGS[name]
    _, base = captured(case)
    gm = llfx.rewrite(base, cfg)
    state = moved(gm)
    merged = llfx.merge(gm)
    weights = {key: value for key, value in state.items() if key.endswith((".lora_weight", ".lora_bias"))}
    read = list(merged.parameters())
    for key, value in weights.items():
        if f"{key.rpartition('.')[0]}.lora_A_2" not in state:
            assert any(value.shape == p.shape and torch.equal(value, p) for p in read), key


def test_files_and_exports_hold_whole_weights_and_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 4)).double()
    ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 1], [0, 2]])
    base = llfx.capture(model, (torch.tensor([[1, 2, 3], [4, 5, 6]]),))
    gm = llfx.rewrite(base, [llfx.TrainableTokens(token_indices=(1, 2)), llfx.Full(target_names=("1", "2"))])
    moved(gm)
    check_file(gm, base, (other,))
    check_export(gm, (torch.tensor([[1, 2, 3], [4, 5, 6]]),), (other,), 1e-12)
    fast = torch.compile(gm, backend="aot_eager", fullgraph=True)
    close(fast(ids).detach(), gm(ids).detach(), 1e-12, "compiled")


def test_a_half_base_trains_in_float32_and_computes_in_its_own_type() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    cfg = llfx.Full(target_names=".")
    gm, wrapped = llfx.rewrite(model, cfg, (x,)), llfx.wrap(model, cfg, (x,))
    state = moved(gm, wrapped)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert gm(x).dtype == torch.bfloat16
    assert torch.equal(gm(x), wrapped(x))
    assert torch.equal(gm(x), llfx.merge(gm)(x))


class Experts(nn.Module):
    """A weight for each of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.up)


def test_a_grouped_convolution_is_trained_whole() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(6, 6, 1, groups=3, bias=False)).double()
    model.insert(1, nn.Flatten(2))
    x, y = torch.randn(2, 4, 5, 5).double(), torch.randn(3, 4, 6, 4).double()
    base = llfx.capture(model, (x,))
    cfg = [cls(target_names=".", target_kinds="grouped_conv") for cls in (llfx.Full, llfx.IA3)]
    with unchanged(model):
        gm, wrapped = llfx.rewrite(base, cfg), llfx.wrap(base, cfg)
        assert torch.equal(gm(x), model(x)), "the start"
        state = moved(gm, wrapped)
        assert {name for name in state if "weight" in name} == {"0.lora_weight", "2.lora_weight"}
        for inputs in (x, y):
            close(gm(inputs), wrapped(inputs), 1e-12, "output")
        own = llfx.rewrite(base, cfg[0])
        values = moved(own)
        merged = llfx.merge(own)
        for name, tensor in values.items():
            assert torch.equal(merged.get_parameter(name.replace("lora_", "")), tensor), name
        assert torch.equal(llfx.remove(gm)(x), model(x))


def test_it_must_be_the_innermost_adapter() -> None:
    model, base = captured("llama")
    cfg = [LORA, llfx.Full(target_names="q_proj")]
    for make in (llfx.rewrite, llfx.wrap, lambda graph, cfg: llfx.rewrite(llfx.rewrite(graph, cfg[0]), cfg[1])):
        with unchanged(model), pytest.raises(llfx.ConfigError, match=r"q_proj'.*put it first in the list"):
            make(base, cfg)


def test_only_what_replaces_its_weight_fits_a_norm() -> None:
    _, base = captured("llama")
    for cfg in (llfx.LoRA(r=1, target_kinds="norm"), llfx.IA3(target_kinds="norm")):
        with pytest.raises(llfx.ConfigError, match="a norm has no matrix"):
            llfx.rewrite(base, cfg)


@pytest.mark.broad
def test_what_cannot_be_trained_whole_is_refused_by_name() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with pytest.raises(llfx.ConfigError, match="a part of 'in_proj_weight'"):
        llfx.rewrite(attention, llfx.Full(target_names="rows_0_"), (x, x, x))
    with pytest.raises(llfx.ConfigError, match="a part of 'in_proj_weight'"):
        llfx.rewrite(attention, llfx.Full(weight=False, target_names="rows_0_"), (x, x, x))
    with pytest.raises(llfx.ConfigError, match=r"'sites\.up' is a stack of experts, which cannot be trained whole"):
        llfx.rewrite(Experts(), llfx.Full(target_names=".", target_kinds="experts"), (torch.randn(2, 3, 4),))
    with pytest.raises(llfx.ConfigError, match="leave nothing to train"):
        llfx.Full(weight=False, bias=False)
    _, base = captured("bert")
    for cfg, message in (
        (llfx.TrainableTokens(token_indices=1), "have weights of their own"),
        (llfx.TrainableTokens(token_indices=VOCABULARY, target_names="word"), "token 32 is out of range"),
    ):
        with pytest.raises(llfx.ConfigError, match=message):
            llfx.rewrite(base, cfg)
    for ids in ((), (1, 1), (-1,)):
        with pytest.raises(llfx.ConfigError, match="token_indices"):
            llfx.TrainableTokens(token_indices=ids)


def test_a_symbolic_trace_names_the_norms_that_it_leaves_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="does not look into norms; with example_inputs"):
        gm = llfx.rewrite(model, llfx.Full(target_names="."))
    assert list(llfx.adapter_state_dict(gm)) == ["0.lora_bias", "0.lora_weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llfx.rewrite(model, llfx.LoRA(r=2, target_names="."))


@pytest.mark.broad
def test_an_adapted_model_generates_merges_and_keeps_it_in_checkpoints(tmp_path: Path) -> None:
    model: Any = MODELS["tied llama"]().eval()
    cfg = [llfx.Full(target_names="norm"), TOKENS, LORA]
    adapted: Any = llfx.adapt(model, cfg)
    wrapped: Any = llfx.wrap(model, cfg)
    moved(adapted)
    y = logits(adapted)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    close(y, logits(wrapped), 1e-5, "output")
    written = [each.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (adapted, wrapped)]
    assert torch.equal(*written)
    close(logits(llfx.merge(adapted)), y, 1e-5, "merged")
    assert torch.equal(logits(llfx.remove(adapted)), logits(model))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(llfx.adapt(model, tmp_path)), y)


def test_the_backend_trains_whole_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 8)
    cfg = [llfx.Full(target_names="2"), llfx.LoRA(r=2, target_names="0")]
    backend = llfx.backend(cfg, inner="eager")
    adapted = backend.adapt(model, x)
    compiled = torch.compile(adapted, backend=backend)
    assert torch.equal(compiled(x), model(x))
    wrapped = llfx.wrap(model, cfg, (x,))
    moved(adapted, wrapped)
    close(compiled(x).detach(), wrapped(x).detach(), 1e-6, "output")
    compiled(x).sum().backward()
    assert adapted.get_parameter("2.lora_weight").grad is not None
