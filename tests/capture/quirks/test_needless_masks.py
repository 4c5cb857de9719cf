"""No masks in a trace where transformers makes none otherwise, and whether it still asks what is replaced for that."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.capture.quirks.all_quirks import concerning, entered
from lora_lite_fx.capture.quirks.needless_masks import MAKERS, makes_masks
from lora_lite_fx.compat import transformers as names
from lora_lite_fx.compat.transformers import MASK_QUESTION
from tests.support.models import tiny_llama
from tests.support.releases import cases_by_name

CASES = cases_by_name()


def attentions(gm: Any) -> list[Any]:
    found: list[Any] = gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    return found


def is_masked(attention: Any) -> bool:
    return len(attention.args) > 3 and attention.args[3] is not None


def test_a_mask_that_shows_everything_is_made_in_a_trace_no_more_than_otherwise() -> None:
    found = attentions(llfx.capture(CASES["vit"].builder()()))
    assert found
    assert not any(map(is_masked, found))


@pytest.mark.slow
def test_a_sequence_that_a_model_shortens_between_layers_needs_no_mask() -> None:
    llfx.capture(CASES["informer"].builder()())  # which compares it with the model


def test_the_release_has_what_is_replaced_and_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice a release that has another function, or one that is not looked up by its name: masks would come back."""
    assert list(inspect.signature(getattr(masking_utils, MASK_QUESTION)).parameters) == [
        "padding_mask", "kv_length", "local_attention_size",
    ]  # fmt: skip
    assert all(hasattr(masking_utils, maker) for maker in MAKERS)
    asked: list[Any] = []

    def is_needless(*args: Any) -> bool:
        asked.append(args)
        return True

    monkeypatch.setattr(masking_utils, MASK_QUESTION, is_needless)
    model = CASES["vit"].builder()()
    model(**example_inputs_of(model))
    assert asked


def test_a_model_that_makes_no_such_masks_replaces_nothing() -> None:
    before = getattr(masking_utils, MASK_QUESTION)
    llama = transformers.LlamaForCausalLM(tiny_llama())
    for model, asks in ((llama, False), (CASES["vit"].builder()(), True)):
        assert makes_masks(model) == asks
        with entered(concerning(model), model, ((), {})):
            assert (getattr(masking_utils, MASK_QUESTION) is not before) == asks
        assert getattr(masking_utils, MASK_QUESTION) is before
    llama.config.is_causal = False
    assert makes_masks(llama)


@pytest.mark.broad
def test_without_the_function_masks_are_made_and_the_graph_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MASK_QUESTION", "gone")
    assert any(map(is_masked, attentions(llfx.capture(CASES["vit"].builder()()))))  # which capture compares
