"""`fuse_loss=True`: in training with labels, head and loss are one operation; all else is as ever."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
)

import lora_lite_fx as llfx
from lora_lite_fx.ops import chunked_loss
from lora_lite_fx.passes import OPTIMIZATIONS, Pipeline
from tests.support.conformance import calibration, randomise, representatives, small
from tests.support.models import tiny_t5
from tests.support.saved import saved_by
from tests.support.selection import broad_after, slow_after, slow_unless

CLASSES = 99
LLAMA: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BERT: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
LABELS: dict[str, Any] = {"num_labels": 70}
MODELS: dict[str, tuple[str, Any]] = {
    "plain": ("LlamaForCausalLM", LlamaConfig(**LLAMA)),
    "tied": ("LlamaForCausalLM", LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "soft-capped": ("Gemma2ForCausalLM", Gemma2Config(**LLAMA, final_logit_softcapping=2.0)),
    "scaled": ("CohereForCausalLM", CohereConfig(**LLAMA)),
    "divided": ("GraniteForCausalLM", GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "GPT-2": ("GPT2LMHeadModel", GPT2Config(vocab_size=CLASSES, n_embd=32, n_layer=1, n_head=4)),
    "with another loss": ("MixtralForCausalLM", MixtralConfig(**LLAMA, num_local_experts=4, output_router_logits=True)),
    "masked words": ("BertForMaskedLM", BertConfig(**BERT)),
    "two stacks": (
        "T5ForConditionalGeneration",
        tiny_t5(vocab_size=CLASSES),
    ),
    "classes": ("LlamaForSequenceClassification", LlamaConfig(**LLAMA, **LABELS, pad_token_id=0)),
    "a class for each token": ("BertForTokenClassification", BertConfig(**BERT, **LABELS)),
}
ATTENTION = llfx.LoRA(r=2, alpha=4.0, target_roles=("query", "value"))
WITH_HEAD = llfx.LoRA(r=2, alpha=4.0, target_names=("q_proj", "lm_head"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_FEWEST_ROWS", 4)


@functools.cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    config.dtype = dtype
    for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "dropout_rate"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    if hasattr(config, "attention_probs_dropout_prob"):
        config.attention_probs_dropout_prob = 0.0
    model = getattr(transformers, kind)(config).to(dtype)
    return model, llfx.capture(model, batch(name))


def batch(name: str = "plain", pattern: str = "half", seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Return tokens and labels: of all tokens, half of them, one, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, CLASSES, (rows, length), generator=generator)
    if name == "classes":
        return {"input_ids": ids, "labels": ids[:, 0] % 70}
    labels = ids.clone() % (70 if name == "a class for each token" else CLASSES)
    if pattern == "half":
        labels[:, : length // 2] = -100
    if pattern in ("one", "none"):
        labels[:] = -100
    if pattern == "one":
        labels[1, 2] = 5
    return {"input_ids": ids, "labels": labels}


def pair(name: str = "plain", cfg: Any = ATTENTION, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return two graphs with the same adapters, the first with the loss fused, in training mode."""
    _, graph = captured(name, dtype)
    return tuple(grown(llfx.rewrite(graph, cfg, fuse_loss=fuse, **options)) for fuse in (True, False))


def grown(model: Any, seed: int = 1) -> Any:
    randomise(model, seed)
    return model.train()


def gradients(model: Any, *calls: dict[str, Any]) -> list[Tensor]:
    """Return the losses of calls, and the gradients of their sum; without calls, the gradients that are there."""
    if calls:
        model.zero_grad()
    losses = [model(**call).loss for call in calls]
    for loss in losses:
        loss.backward()
    found = [p.grad for p in llfx.adapter_parameters(model)]
    return [*(loss.detach() for loss in losses), *(grad for grad in found if grad is not None)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 1
    largest = max(float(expected.detach().abs().nan_to_num().max()) for expected in theirs)
    for value, expected in zip(ours, theirs, strict=True):
        allowed = tolerance * max(float(expected.detach().abs().nan_to_num().max()), largest / 10)
        torch.testing.assert_close(value, expected, rtol=0, atol=allowed, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    broad_after(
        1, slow_unless({"plain", "tied", "soft-capped", "with another loss", "two stacks"}.__contains__, MODELS)
    ),
)
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    fused, plain = pair(name, llfx.LoRA(r=2, target_roles=("query",)))
    for pattern in ("half", "all", "one", "none"):
        call = batch(name, pattern)
        assert fused(**call).logits is None
        assert plain(**call).logits is not None
        assert_close(gradients(fused, call), gradients(plain, call))
    assert next(report.edits for report in llfx.program(fused, "training").meta["report"].passes) == 1


def test_in_evaluation_and_without_labels_logits_are_as_ever() -> None:
    fused, plain = pair()
    call = batch()
    without = {"input_ids": call["input_ids"]}
    for ours, theirs in (
        (fused(**without), plain(**without)),
        (fused.eval()(**call), plain.eval()(**call)),
        (fused(**without), plain(**without)),
    ):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
    with torch.no_grad(), llfx.frozen(fused):
        torch.testing.assert_close(fused(**call).logits, plain(**call).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        ours, theirs = fused.train()(**call), plain.train()(**call)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.broad
@pytest.mark.parametrize("dtype", slow_after(1, [torch.float64, torch.bfloat16, torch.float16]))
def test_the_types_are_those_of_the_logits(dtype: torch.dtype) -> None:
    fused, plain = pair("plain", WITH_HEAD, dtype)
    ours, theirs = gradients(fused, batch()), gradients(plain, batch())
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    # transformers computes the loss in float32.
    assert_close(ours, theirs, {torch.float64: 1e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype])


@pytest.mark.broad
def test_autocast_is_followed() -> None:
    fused, plain = pair("soft-capped", WITH_HEAD)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gradients(fused, batch()), gradients(plain, batch()), 4e-2)


class Model(nn.Module):
    """Classifies tokens, without any library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(CLASSES, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 64)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(torch.tanh(self.body(self.embed(ids))))
        return F.cross_entropy(logits.view(-1, 64), labels.view(-1)), logits


@functools.cache
def small_model() -> tuple[nn.Module, tuple[Tensor, Tensor], fx.GraphModule]:
    model, ids = Model(), torch.randint(CLASSES, (2, 5), generator=torch.Generator().manual_seed(0))
    labels = (ids % 64).clone()
    labels[0, :3] = -100
    return model, (ids, labels), llfx.capture(model, (ids, labels))


IN_BLOCKS = {"C3A", "GraLoRA", "LoKr", "RoAd"}
"""Variants that compute parts of a row of logits apart, and join them."""


@pytest.mark.broad
@pytest.mark.parametrize("name", broad_after(2, dict.fromkeys([*representatives(), *sorted(IN_BLOCKS)])))
def test_every_variant_may_adapt_the_head(name: str) -> None:
    model, inputs, graph = small_model()
    cfg = small(llfx.registry()[name], 4, alpha=2.0, target_names=("head", "body"))
    data = calibration(cfg, inputs, inputs)
    fused = grown(llfx.rewrite(graph, cfg, calibration=data, fuse_loss=True))
    wrapped = grown(llfx.wrap(graph, cfg, calibration=data))
    found = []
    for module in (fused, wrapped):
        loss, _ = module(*inputs)
        loss.backward()
        found.append([loss.detach(), *gradients(module)])
    assert_close(found[0], found[1])
    assert (fused(*inputs)[1] is None) == (name not in IN_BLOCKS), llfx.program(fused, "training").meta["report"]
    assert model is not None


@pytest.mark.broad
def test_several_adapters_and_their_switches_are_followed() -> None:
    _, graph = captured("plain")
    cfg = {"a": WITH_HEAD, "b": llfx.IA3(target_names=("lm_head",)), "c": llfx.DoRA(r=2, target_names=("lm_head",))}
    fused, plain = (grown(llfx.rewrite(graph, cfg, fuse_loss=fuse)) for fuse in (True, False))
    call = batch()
    assert_close(gradients(fused, call), gradients(plain, call))
    for names in (["a"], ["b", "c"]):
        with llfx.active(fused, names), llfx.active(plain, names):
            assert_close(gradients(fused, call), gradients(plain, call))
            assert fused(**call).logits is None
    for scale in (-0.5, torch.tensor([0.5, 1.0, -2.0])):
        with llfx.scaled(fused, {"a": scale}), llfx.scaled(plain, {"a": scale}):
            assert_close(gradients(fused, call), gradients(plain, call))


def test_dropout_of_an_adapter_on_the_head_drops_the_same() -> None:
    fused, plain = pair("plain", llfx.LoRA(r=2, alpha=4.0, dropout=0.5, target_names=("lm_head",)))
    found = []
    for model in (fused, plain):
        torch.manual_seed(3)
        found.append(gradients(model, batch()))
    assert_close(found[0], found[1])
    assert fused(**batch()).logits is None


@pytest.mark.broad
@pytest.mark.parametrize("checkpoint_layers", slow_after(1, [False, True]))
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_may_be_accumulated_checkpointed_and_compiled(checkpoint_layers: bool, compiled: bool) -> None:
    fused, plain = pair("soft-capped", WITH_HEAD, checkpoint_layers=checkpoint_layers)
    calls = [batch(seed=seed, pattern=pattern) for seed, pattern in enumerate(("half", "all", "one"))]
    expected = gradients(plain, *calls)
    if compiled:
        torch.compiler.reset()
        run: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
        fused.zero_grad()
        results = [run(**call) for call in calls]
        assert all(result.logits is None for result in results)
        torch.stack([result.loss for result in results]).sum().backward()
        ours = [*(result.loss.detach() for result in results), *gradients(fused)]
    else:
        ours = gradients(fused, *calls)
    assert_close(ours, expected)


def test_a_whole_step_may_run_again_in_the_backward_pass() -> None:
    fused, plain = pair()
    call = batch()
    loss: Any = checkpoint(lambda: fused(**call).loss, use_reentrant=False)
    loss.backward()
    assert_close([loss.detach(), *gradients(fused)], gradients(plain, call))


@pytest.mark.parametrize("cfg", [ATTENTION, WITH_HEAD], ids=["attention", "with head"])
def test_no_logits_are_saved(cfg: Any) -> None:
    fused, plain = pair("plain", cfg)
    call = batch(rows=4, length=16)
    narrow, logits = 4 * 16 * 32 * 4, 4 * 16 * CLASSES * 4
    less = saved_by(plain, call) - saved_by(fused, call)
    # Softmax is saved, and not the gradient of h; of an adapter on the head also that of t, as large as t.
    assert logits - narrow - 2048 <= less <= logits


def test_labels_that_do_not_match_the_tokens_are_refused() -> None:
    fused, _ = pair()
    call = batch()
    with pytest.raises((llfx.AdapterError, AssertionError, ValueError)):
        fused(input_ids=call["input_ids"], labels=call["labels"][:2])


def test_a_hook_on_the_head_gets_its_logits() -> None:
    fused, plain = pair("plain", WITH_HEAD)
    call, seen = batch(), list[Any]()
    handle = fused.get_submodule("lm_head").register_forward_hook(lambda m, args, output: seen.append(output.shape))
    assert fused(**call).logits.shape == (3, 7, CLASSES)
    assert seen == [(3, 7, CLASSES)]
    assert "a hook stands on lm_head" in str(llfx.program(fused, "training").meta["report"])
    assert_close(gradients(fused, call), gradients(plain, call))
    handle.remove()
    assert fused(**call).logits is None


# How it is asked for.


def test_without_being_asked_for_nothing_is_fused() -> None:
    _, plain = pair()
    assert plain(**batch()).logits is not None
    assert "fuse_loss" not in str(llfx.program(plain, "training").meta["report"])


def test_copies_and_further_adapters_are_fused_too_unless_that_is_switched_off() -> None:
    fused, plain = pair()
    call = batch()
    merged, removed = (make(fused).train() for make in (llfx.merge, llfx.remove))
    more = llfx.rewrite(fused, llfx.IA3())
    for model in (copy.deepcopy(fused), more, merged, removed, llfx.optimize(fused)):
        assert model.train()(**call).logits is None
    for model in (
        llfx.rewrite(fused, llfx.IA3(), fuse_loss=False),
        llfx.optimize(fused, OPTIMIZATIONS.without("fuse_loss")),
    ):
        assert model.train()(**call).logits is not None
    assert_close(gradients(copy.deepcopy(fused), call), gradients(plain, call))


def test_passes_are_checked_around_it() -> None:
    fused, _ = pair("plain", WITH_HEAD)
    checked = llfx.optimize(fused, Pipeline(OPTIMIZATIONS.passes, check=batch()))
    assert checked(**batch()).logits is None


@pytest.mark.broad
def test_it_is_compared_with_the_model() -> None:
    model, graph = captured("soft-capped")
    fused = llfx.rewrite(graph, WITH_HEAD, fuse_loss=True)
    table = llfx.verify(fused, model, batch())
    assert table.ok, table


def test_an_export_has_all_logits() -> None:
    fused, plain = pair("plain", WITH_HEAD)
    call = batch()
    exported: Any = torch.export.export(fused, (), call).module()
    assert_close([exported(**call).loss, exported(**call).logits], [plain(**call).loss, plain(**call).logits])


@pytest.mark.broad
def test_loaded_adapters_may_be_fused(tmp_path: Path) -> None:
    model, graph = captured("plain")
    fused, _ = pair("plain", WITH_HEAD)
    llfx.save(fused, tmp_path / "adapter.safetensors")
    llfx.save_peft(fused, tmp_path / "peft")
    expected = gradients(fused, batch())
    for source in (model, graph):
        for load, path in ((llfx.load, "adapter.safetensors"), (llfx.load_peft, "peft")):
            loaded = load(source, tmp_path / path, fuse_loss=True).train()
            assert loaded(**batch()).logits is None
            assert_close(gradients(loaded, batch()), expected)
