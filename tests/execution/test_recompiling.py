"""torch.compile compiles a call once: not again for the next batch, nor after a scope that was opened in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lora_lite_fx as llfx
from tests.support.compilations import graphs
from tests.support.conformance import randomise
from tests.support.models import tiny_llama
from tests.support.selection import slow_after, slow_unless

CONFIGS = {"fr": llfx.LoRA(r=2), "de": llfx.DoRA(r=2)}
FORMS = ["a graph", "an adapted model", "the layers of a graph", "the layers of an adapted model"]


pytestmark = pytest.mark.usefixtures("count_from_zero")


def plain_and_compiled(form: str) -> tuple[Any, Any]:
    """Return a model and how it is called when it is compiled; they are one object if its layers are."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama(num_hidden_layers=2, pad_token_id=0, eos_token_id=1))
    model: Any = llfx.rewrite(base, CONFIGS) if "graph" in form else llfx.adapt(base, CONFIGS)
    randomise(model, 0)
    if "layers" in form:
        return model, llfx.compile_layers(model, backend="eager")
    return model, torch.compile(model, backend="eager")


def batch(seed: int) -> dict[str, Any]:
    """Return tensors of one shape that no call has seen."""
    tokens = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


@pytest.mark.broad
@pytest.mark.parametrize("form", slow_unless("an adapted model".__eq__, FORMS))
def test_batches_and_scopes_compile_nothing_again(form: str) -> None:
    model, compiled = plain_and_compiled(form)

    def step(seed: int) -> int:
        model.train()
        compiled(**batch(seed)).loss.backward()
        model.eval()
        with torch.no_grad():
            compiled(**batch(seed))
        return graphs()

    def switched(seed: int) -> int:
        with llfx.active(model, "fr"), torch.no_grad():
            model.eval()
            compiled(**batch(seed))
        return graphs()

    first = step(0)
    assert 0 < first == step(1) == step(2)
    with llfx.frozen(model):
        model.eval()
        model(**batch(3))
    if hasattr(model, "generate"):
        model.generate(batch(4)["input_ids"], max_new_tokens=3, do_sample=False)
    in_between = graphs()  # compiled layers run in calls of the model too, by programs of their own
    assert step(5) == in_between
    second = switched(6)
    assert second > in_between
    assert switched(7) == second == step(8)


@pytest.mark.broad
@pytest.mark.parametrize("form", slow_after(1, FORMS[:2]))
def test_the_first_call_may_be_within_a_scope(form: str) -> None:
    model, compiled = plain_and_compiled(form)
    model.eval()
    with torch.no_grad():
        with llfx.frozen(model), llfx.active(model, "de"):
            inside = compiled(**batch(0)).logits
            expected = model(**batch(0)).logits
        outside = compiled(**batch(0)).logits
        torch.testing.assert_close(inside, expected)
        torch.testing.assert_close(outside, model(**batch(0)).logits)
    assert not torch.allclose(inside, outside)
    assert graphs() == 2


@pytest.mark.slow
def test_calls_of_other_kinds_in_between_compile_nothing_again() -> None:
    base = LlamaForCausalLM(tiny_llama(pad_token_id=0, eos_token_id=1))
    model: Any = llfx.adapt(base, llfx.LoRA(r=2), fuse_loss=True)  # training has a graph of its own
    compiled = torch.compile(model, backend="eager")

    def step(call: Any, seed: int) -> int:
        model.train()
        call(**batch(seed)).loss.backward()
        return graphs()

    def evaluate(call: Any, seed: int) -> int:
        model.eval()
        with torch.no_grad():
            call(**batch(seed))
        return graphs()

    step(model, 0)
    evaluate(model, 0)
    assert len(model.graphs) == 2
    assert step(compiled, 1) == step(compiled, 2) == evaluate(model, 3) == step(compiled, 4) == 1
    assert evaluate(compiled, 5) == evaluate(compiled, 6) == step(model, 7) == evaluate(compiled, 8) == 2
