"""The calls of a model that are tried: its example inputs, and others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite_fx.capture.capture_model import origin_of
from lora_lite_fx.capture.inputs.example_inputs import example_inputs_of
from lora_lite_fx.capture.origins.origin import is_hugging_face
from lora_lite_fx.capture.shared_copy import shared_copy


def calls_of(model: Any, given: bool, without: Collection[str] = ()) -> list[tuple[str, Any]]:
    """The example's inputs, and others: a smaller batch that is longer, with padding on the left.

    Args:
        model: to call.
        given: whether with the inputs that the survey gives it, and not with those of its config.
        without: images or sound, if the model was captured without.
    """
    if given:
        return [(what, _in_dtype_of(model, inputs)) for what, inputs in given_calls(model).items()]
    calls = [("example", example_of(model, given, without))]
    tokens = calls[0][1].get("input_ids")
    if is_hugging_face(model) and isinstance(tokens, Tensor):
        only_text = all(value.shape[:2] == tokens.shape for value in calls[0][1].values() if value.dim() >= 2)
        if only_text:
            calls.append(("other sizes", _longer(calls[0][1])))
            if "attention_mask" in calls[0][1]:
                calls.append(("left padding", _padded(calls[0][1])))
            return calls
    batch = next(iter(calls[0][1].values())).shape[0]
    if batch > 1 and all(value.shape[:1] == (batch,) for value in calls[0][1].values()):
        calls.append(("other batch", {name: value[1:] for name, value in calls[0][1].items()}))
    return calls


def given_calls(model: Any) -> dict[str, dict[str, Any]]:
    """Return the inputs that a user passes, by call; none for a model whose config tells inputs."""
    calls: dict[str, dict[str, Any]] = getattr(model, "survey_calls", {})
    return calls


def example_of(model: Any, given: bool, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the inputs of a call: those that the survey gives it, or as the config of the model says."""
    if given:
        return _in_dtype_of(model, given_calls(model)["example"])
    if is_hugging_face(model):
        prepared = shared_copy(model)
        origin_of(prepared).prepare(prepared)
        inputs = example_inputs_of(prepared, without)
        return _in_dtype_of(model, inputs)
    size = model.pretrained_cfg["input_size"]  # of timm
    return {"x": torch.randn(2, *size, generator=torch.Generator().manual_seed(0))}


def _in_dtype_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        return value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    cast_inputs: dict[str, Any] = pytree.tree_map(cast, inputs)
    return cast_inputs


def _longer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    size = {name: value for name, value in inputs.items() if value.dim() >= 2}
    longer = {name: torch.cat([value[1:], value[1:].flip(1)], 1) for name, value in size.items()}
    return {**{name: value[1:] for name, value in inputs.items()}, **longer}


def _padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs["attention_mask"].clone()
    mask[0, :2] = 0
    return {**inputs, "attention_mask": mask}


def other_inputs(model: Any, given: bool) -> dict[str, Any]:
    """Return inputs of another kind: with padding on the left, and without labels."""
    inputs = example_of(model, given)
    labels = inputs.pop("labels", None)
    if is_hugging_face(model) and model.config.is_encoder_decoder and labels is not None:
        inputs.setdefault("decoder_input_ids", labels)
    return _padded(inputs) if "attention_mask" in inputs else inputs
