"""`adapt(..., fuse_loss=True)`: training has a graph without logits, and all other calls are as ever."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.models import tiny_llama
from tests.support.selection import broad_after, slow_after, slow_unless

CONFIG = llfx.LoRA(r=2, alpha=4.0, target_names=("q_proj", "lm_head"))
IDS = torch.randint(99, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, :4] = -100


@functools.cache
def base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama())


@functools.cache
def models() -> tuple[Any, Any]:
    """Return two adapted models with the same adapters; the first has the loss fused."""
    adapted = tuple(llfx.adapt(base(), CONFIG, fuse_loss=fuse) for fuse in (True, False))
    for model in adapted:
        randomise(model, 1)
    return adapted


def step(model: Any, **call: Any) -> list[Tensor]:
    """Return the loss and the gradients of a call in training mode."""
    model.train().zero_grad()
    loss = model(**call).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in llfx.adapter_parameters(model) if p.grad is not None)]


CALLS: dict[str, dict[str, Any]] = {
    "labels": {"input_ids": IDS, "labels": LABELS},
    "a mask": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS, "use_cache": False},
    "a count": {"input_ids": IDS, "labels": LABELS, "num_items_in_batch": 5},
    "a count of another step": {"input_ids": IDS, "labels": LABELS, "num_items_in_batch": torch.tensor(17)},
    "shifted labels": {
        "input_ids": IDS,
        "labels": LABELS,
        "shift_labels": F.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous(),
    },
    "embeddings": {"inputs_embeds": torch.ones(2, 3, 32), "labels": LABELS[:2, -3:]},
}


@pytest.mark.parametrize("name", broad_after(1, slow_after(3, CALLS)))
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    fused, plain = models()
    torch.testing.assert_close(step(fused, **CALLS[name]), step(plain, **CALLS[name]), rtol=1e-4, atol=1e-6)
    assert fused(**CALLS[name]).logits is None
    loss, *more = fused(**CALLS[name], return_dict=False)
    assert loss.dim() == 0
    assert not any(isinstance(value, Tensor) for value in more)


@pytest.mark.broad
def test_evaluation_generation_and_calls_without_labels_are_as_ever() -> None:
    fused, plain = models()
    for training, call in ((True, {"input_ids": IDS}), (False, CALLS["labels"]), (False, {"input_ids": IDS})):
        ours, theirs = fused.train(training)(**call), plain.train(training)(**call)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=0)
    tokens = [model.eval().generate(IDS, max_new_tokens=4, do_sample=False) for model in (fused, plain)]
    assert torch.equal(*tokens)


@pytest.mark.broad
def test_the_first_graph_is_that_of_training_and_the_same_adapters_are_in_all() -> None:
    model = llfx.adapt(base(), CONFIG, fuse_loss=True)
    assert len(model.graphs) == 1
    assert llfx.program(model, "training").meta["report"].passes[0].name == "fuse_loss"
    model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS)
    assert len(model.graphs) == 1
    llfx.add(model, {"more": llfx.IA3(target_names=("lm_head",))})
    randomise(model, 2)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(step(twin, **CALLS["labels"]), step(model, **CALLS["labels"]))
    assert twin(**CALLS["labels"]).logits is None
    merged = llfx.merge(model.eval())
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.broad
def test_a_model_follows_its_graph() -> None:
    graph = llfx.rewrite(base(), CONFIG, fuse_loss=True)
    assert llfx.adapt(graph).train()(**CALLS["labels"]).logits is None
    assert llfx.adapt(graph, fuse_loss=False).train()(**CALLS["labels"]).logits is not None


@pytest.mark.slow
@pytest.mark.parametrize("fuse_loss", slow_unless(bool, [False, True]))
def test_a_compiled_call_may_be_the_first_of_its_kind(fuse_loss: bool) -> None:
    model = llfx.adapt(base(), CONFIG, fuse_loss=fuse_loss).train()
    compiled: Any = torch.compile(model, backend="aot_eager")
    call = CALLS["a count"]
    torch.testing.assert_close(compiled(**call).loss, model(**call).loss)
