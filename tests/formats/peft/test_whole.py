"""What PEFT trains and saves beside an adapter: whole modules, biases, tokens and embeddings; PEFT is the oracle."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lora_lite_fx as llfx
from lora_lite_fx.testing.comparisons import unchanged
from tests.support.conformance import randomise
from tests.support.releases import has
from tests.support.selection import broad_after, slow_after

VOCABULARY = 40
IDS = torch.tensor([[3, 7, 9, 3, 11], [5, 7, 2, 1, 4]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def _llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_bias=True, **fields)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(_llama()),
    "tied": lambda: LlamaForCausalLM(_llama(tie_word_embeddings=True)),
    "classifier": lambda: LlamaForSequenceClassification(_llama(num_labels=3)),
    "encoder": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=24)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    ),
}
Q = ["q_proj"]
CASES: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "a classifier": ("classifier", lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=Q)),
    "an encoder's head": ("encoder", lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])),
    "beside IA3": (
        "encoder",
        lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]),
    ),
    "head, embedding and norms": (
        "llama",
        lambda: peft.LoraConfig(target_modules=Q, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    ),
    "a tied head": ("tied", lambda: peft.LoraConfig(target_modules=Q, modules_to_save=["lm_head"])),
    "a tied embedding": ("tied", lambda: peft.LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"])),
    "a block": ("llama", lambda: peft.LoraConfig(target_modules=Q, modules_to_save=["mlp"])),
    "all biases": ("llama", lambda: peft.LoraConfig(target_modules=Q, bias="all")),
    "biases of adapted modules": ("llama", lambda: peft.LoraConfig(target_modules=Q, bias="lora_only")),
    "all biases and a head": (
        "encoder",
        lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all"),
    ),
    "Conv1D": (
        "gpt2",
        lambda: peft.LoraConfig(target_modules=["c_attn"], bias="all", modules_to_save=["wpe", "c_fc"]),
    ),
    "tokens": ("llama", lambda: peft.LoraConfig(target_modules=Q, trainable_token_indices=[3, 7, 39])),
    "tokens of a tied embedding": ("tied", lambda: peft.LoraConfig(target_modules=Q, trainable_token_indices=[3, 7])),
    "tokens by name": (
        "llama",
        lambda: peft.LoraConfig(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [2]}),
    ),
    "trained tokens, tied as always": (
        "tied",
        lambda: peft.LoraConfig(target_modules=Q, trainable_token_indices=[3], ensure_weight_tying=True),
    ),
    "LN-tuning": ("llama", lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm", "k_proj"])),
    "LN-tuning of a block, and a head": (
        "llama",
        lambda: peft.LNTuningConfig(target_modules=r".*mlp|.*norm", modules_to_save=["lm_head"]),
    ),
    "tokens alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 39])),
    "tokens alone, of a tied embedding": ("tied", lambda: peft.TrainableTokensConfig(token_indices=[3, 7])),
    "an adapted head": ("llama", lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"])),
    "an adapted tied head": ("tied", lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"])),
    "an adapted embedding": ("llama", lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])),
}


@functools.cache
def captured(name: str) -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at values that hide mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, llfx.capture(model, INPUTS)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**INPUTS).logits
    return y


def trained(model: Any, config: peft.PeftConfig) -> Any:
    """Return the model with a PEFT adapter whose values, and those beside it, have moved."""
    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about embeddings and ties
@pytest.mark.parametrize("case", broad_after(1, slow_after(6, CASES)))
def test_files_compute_the_same_both_ways_and_new_adapters_train_the_same(case: str, tmp_path: Path) -> None:
    if case == "biases of adapted modules" and not has("peft", "0.21"):
        pytest.skip("PEFT writes the biases of adapted modules since 0.21: its own files lacked them")
    name, make = CASES[case]
    model, graph = captured(name)
    theirs = trained(model, make())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs)
    assert (expected - logits(model)).abs().max() > 1e-2
    with unchanged(model):
        loaded = llfx.load_peft(graph, tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    llfx.save_peft(loaded, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(back), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(llfx.load_peft(graph, tmp_path / "ours")), logits(loaded), rtol=0, atol=0)
    new = llfx.rewrite(graph, llfx.from_peft_config(make()))
    assert torch.equal(logits(new), logits(graph))
    sizes = sorted(p.numel() for p in theirs.parameters() if p.requires_grad)
    of_original = [p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "original_module" in n]
    for size in of_original:  # PEFT marks the biases of the copied modules too, and does not use them
        sizes.remove(size)
    assert sorted(p.numel() for p in llfx.adapter_parameters(new)) == sizes


def test_what_was_loaded_is_named_by_variant_and_site(tmp_path: Path) -> None:
    model, graph = captured("classifier")
    trained(model, CASES["a classifier"][1]()).save_pretrained(str(tmp_path))
    rows = llfx.adapters(llfx.load_peft(graph, tmp_path))
    assert [(row.variant, [site.name for site in row.sites]) for row in rows] == [
        ("Full", ["score"]),
        ("LoRA", ["model.layers.0.self_attn.q_proj"]),
    ]


@pytest.mark.broad
def test_saved_embeddings_must_be_those_of_the_base(tmp_path: Path) -> None:
    model, graph = captured("llama")
    trained(model, CASES["an adapted head"][1]()).save_pretrained(str(tmp_path))
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(1.5)
    with unchanged(other), pytest.raises(llfx.CheckpointError, match=r"lm_head\.base_layer\.weight.*other values"):
        llfx.load_peft(other, tmp_path, INPUTS)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, key: torch.cat([tensors[key], tensors[key][:4]])}, file)
    with pytest.raises(llfx.CheckpointError, match=r"model\.resize_token_embeddings\(44\)"):
        llfx.load_peft(graph, tmp_path)


@pytest.mark.broad
@pytest.mark.filterwarnings("ignore:.*tie")  # PEFT's own
@pytest.mark.parametrize("what", ["an adapted embedding", "an adapted embedding by pattern", "a trained embedding"])
def test_an_adapter_that_is_tied_is_read_as_two_with_a_warning_and_is_not_made(what: str, tmp_path: Path) -> None:
    model, graph = captured("tied")
    cases: dict[str, dict[str, Any]] = {
        "an adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "an adapted embedding by pattern": {"target_modules": r".*q_proj|.*embed_tokens"},
        "a trained embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    }
    fields = cases[what]
    config = peft.LoraConfig(**fields, ensure_weight_tying=True)
    with pytest.raises(llfx.ConfigError, match="ensure_weight_tying=True with embed_tokens"):
        llfx.from_peft_config(config)
    theirs = trained(model, config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(UserWarning, match="one adapter for the embedding and the head") as caught:
        loaded = llfx.load_peft(graph, tmp_path / "theirs")
    assert caught[0].filename == __file__
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-5, atol=1e-6)
    llfx.save_peft(loaded, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.broad
def test_another_base_of_whole_tensors_is_a_warning_at_the_users_line(tmp_path: Path) -> None:
    model, graph = captured("llama")
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(1.5)
    other_graph = llfx.capture(other, INPUTS)
    configs: list[Any] = [llfx.Full(), [llfx.Full(), llfx.LoRA(r=2, target_names="q_proj")]]
    for number, cfg in enumerate(configs):
        llfx.save_peft(llfx.rewrite(graph, cfg), tmp_path / str(number))
        with pytest.warns(UserWarning, match=r"the Full adapter was made for other weights.*lm_head") as caught:
            llfx.load_peft(other_graph, tmp_path / str(number))
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.broad
def test_another_base_of_trained_tokens_is_a_warning(tmp_path: Path) -> None:
    model, graph = captured("llama")
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data.mul_(1.5)
    llfx.save_peft(llfx.rewrite(graph, llfx.TrainableTokens(token_indices=(3,))), tmp_path)
    with pytest.warns(UserWarning, match=r"the TrainableTokens adapter was made for other weights.*embed_tokens"):
        llfx.load_peft(llfx.capture(other, INPUTS), tmp_path)


DAMAGED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "a weight that nothing asks for": ({}, {"model.norm.weight": torch.ones(16)}, "other values"),
    "a module that is not there": (
        {"modules_to_save": ["x"]},
        {"x.weight": torch.ones(3)},
        "is not the weight or bias",
    ),
    "another shape": ({"modules_to_save": ["lm_head"]}, {"lm_head.weight": torch.ones(VOCABULARY, 3)}, r"\(40, 16\)"),
    "half a module": (
        {"modules_to_save": ["k_proj"]},
        {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 16)},
        "lacks lora_bias",
    ),
    "tokens without ids": (
        {},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)},
        "names no tokens",
    ),
    "too few tokens": (
        {"trainable_token_indices": [1, 2]},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)},
        "shape",
    ),
    "a bias that does not train": ({}, {"model.layers.0.self_attn.k_proj.bias": torch.ones(16)}, "other values"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_directory_that_does_not_fit_is_refused_and_changes_nothing(what: str, tmp_path: Path) -> None:
    fields, tensors, message = DAMAGED[what]
    model, graph = captured("llama")
    site = "model.layers.0.self_attn.q_proj"
    lora = {f"{site}.lora_A.weight": torch.ones(2, 16), f"{site}.lora_B.weight": torch.ones(16, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": Q, **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in {**lora, **tensors}.items()}
    save_file(prefixed, tmp_path / "adapter_model.safetensors")
    with unchanged(model), pytest.raises(llfx.CheckpointError, match=message):
        llfx.load_peft(graph, tmp_path)


def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    _, graph = captured("llama")
    lora = llfx.LoRA(r=2, target_names="q_proj")
    for cfg, message in (
        ([llfx.Full(target_names="q_proj"), lora], "whole or adapts it, not both"),
        ([llfx.Full(target_names="k_proj", bias=False), lora], "the weight alone is trained"),
        ([llfx.Full(target_names="k_proj", weight=False), lora], "here it is 1 of 4"),
    ):
        with pytest.raises(llfx.ConfigError, match=message):
            llfx.save_peft(llfx.rewrite(graph, cfg), tmp_path / "adapter")
    tokens = llfx.TrainableTokens(token_indices=3, target_names="embed_tokens")
    for whole, message in (
        (llfx.Full(weight=False, target_names="."), "and not bias"),
        ([llfx.Full(), tokens], "and not modules_to_save and trainable_token_indices"),
        (
            [tokens, llfx.TrainableTokens(token_indices=4, target_names="lm_head", target_kinds="linear")],
            "here they differ",
        ),
    ):
        with pytest.raises(llfx.ConfigError, match=message):
            llfx.save_peft(llfx.rewrite(graph, whole), tmp_path / "adapter")
    with pytest.raises(llfx.ConfigError, match="rows start as copies"):
        llfx.from_peft_config(peft.TrainableTokensConfig(token_indices=[1], init_weights=False))
    assert not list(tmp_path.iterdir())


class Attention(nn.Module):
    """Has modules whose names end alike, an attention module, and a weight that it reads without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.wide_fc = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0] @ self.weight
        out: Tensor = self.wide_fc(self.fc(y))
        return out


@pytest.mark.parametrize(
    ("adapted", "trained", "message"),
    broad_after(
        1,
        [
            ("wide_fc", "^fc$", "cannot name 'fc' as a module to train without 'wide_fc'"),
            ("in_proj", r"out_proj$", "adapts all of 'attention', and trains nothing in it beside"),
            ("wide_fc", r"\.weight$", "is not a module of its own"),
        ],
        several=True,
    ),
)
def test_modules_that_peft_cannot_train_beside_an_adapter_are_refused(
    adapted: str, trained: str, message: str, tmp_path: Path
) -> None:
    model = Attention()
    configs = [llfx.Full(target_names=trained), llfx.LoRA(r=2, target_names=adapted)]
    gm = llfx.rewrite(model, configs, (torch.randn(2, 3, 8),))
    with pytest.raises(llfx.ConfigError, match=message):
        llfx.save_peft(gm, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [llfx.rewrite, lambda *args: llfx.wrap(llfx.capture(args[0], args[2]), args[1])])
def test_biases_of_modules_named_as_the_wrapper_names_what_it_wraps(make: Any, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("base", nn.Linear(8, 8))
    model.add_module("inner", nn.Sequential())
    model.inner.add_module("base", nn.Linear(8, 8))  # type: ignore[union-attr]
    biases = llfx.Full(weight=False, bias=True, target_names=("base",))
    x = torch.randn(3, 8)
    adapted = make(model, [biases, llfx.LoRA(r=2, target_names=("base",))], (x,))
    randomise(adapted, 0)
    llfx.save_peft(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    assert torch.allclose(theirs(x), adapted(x), atol=1e-6)
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)
