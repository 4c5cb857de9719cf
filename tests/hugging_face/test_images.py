"""Adapted models that take images equal the eager wrapper, also in `generate`, which calls some parts by itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_fx as llfx
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from tests.support.conformance import close, randomise
from tests.support.releases import cases_by_name
from tests.support.selection import slow_unless

CASES = cases_by_name()
CONFIGS = {
    "git": llfx.LoRA(r=2, target_names=("query",)),
    "qwen2_vl": llfx.LoRA(r=2, target_names=("q_proj", "qkv", "merger")),
    "internvl": llfx.LoRA(r=2, target_names=("q_proj", "multi_modal_projector")),
    "llava": llfx.LoRA(r=2, target_names=("q_proj", "multi_modal_projector")),
}


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """Return an adapted model and the eager wrapper, with the same adapters."""
    model = CASES[name].builder()().double()
    model(**inputs_of(model))  # installs transformers' own hooks, which collect the hidden states of images for LLaVA
    adapted, wrapped = llfx.adapt(model, CONFIGS[name]), llfx.wrap(model, CONFIGS[name])
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    return adapted, wrapped


def inputs_of(model: Any) -> dict[str, Tensor]:
    inputs = example_inputs_of(model)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def require_equal(name: str, inputs: dict[str, Tensor]) -> None:
    actual, expected = (model(**inputs) for model in models(name))
    close(actual.logits, expected.logits, 1e-9, "logits")
    gradients = []
    for model, output in zip(models(name), (actual, expected), strict=True):
        total = (output.logits * torch.linspace(-1, 1, output.logits.numel()).view_as(output.logits)).sum()
        gradients.append(torch.autograd.grad(total, [*llfx.adapter_parameters(model)]))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-9, "gradients")


@pytest.mark.slow
def test_the_grid_of_an_image_is_a_part_of_the_graph() -> None:
    adapted, _ = models("qwen2_vl")
    inputs = inputs_of(adapted)
    require_equal("qwen2_vl", inputs)
    before = adapted._graphs.captures
    frames, height, width = inputs["image_grid_thw"][0].tolist()
    other = torch.tensor([[frames, height // 2, width * 2]]).expand_as(inputs["image_grid_thw"])
    for grid in (other, inputs["image_grid_thw"]):
        require_equal("qwen2_vl", {**inputs, "image_grid_thw": grid})
    assert adapted._graphs.captures == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless(("qwen2_vl",).__contains__, ["qwen2_vl", "internvl", "llava"]))
@pytest.mark.filterwarnings("error:A hook on")
def test_generate_equals_the_eager_wrapper(name: str) -> None:
    adapted, wrapped = models(name)
    prompt = {name: value for name, value in inputs_of(adapted).items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    actual, expected = (model.eval().generate(**prompt, **options).logits for model in (adapted, wrapped))
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs, 1e-9, "logits")


@pytest.mark.slow
def test_logits_are_of_the_right_places_where_an_image_stands_before_the_text() -> None:
    adapted, _ = models("git")
    inputs = inputs_of(adapted)
    tokens = inputs["input_ids"].shape[1]
    require_equal("git", inputs)
    assert adapted(**{name: value for name, value in inputs.items() if name != "labels"}).logits.shape[1] > tokens
    require_equal("git", {name: value for name, value in inputs.items() if name not in ("labels", "pixel_values")})
    test_generate_equals_the_eager_wrapper("git")
