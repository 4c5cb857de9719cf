"""Complete example inputs by labels or by a decoder's tokens: the model is asked, without data, which ones it takes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..depth.stacks import built_alike, shortened
from .config_values import READS_VALUES, SEQUENCE, Inputs, Values


def completed(values: Values, inputs: Inputs) -> Inputs:
    """Return `inputs` with labels that fit the logits, if the model computes a loss from them and from sizes.

    Else, and where `values.labels` is not set, with the tokens of a decoder, which a model otherwise makes of labels.
    Raises what the model raises of them.
    """
    asked = inputs
    if values.has_decoder:
        asked = {"decoder_input_ids": torch.zeros_like(values.tokens(SEQUENCE)), **inputs}
    try:
        logits = getattr(_called_without_data(values, asked), "logits", None)
    except READS_VALUES:  # such as the count of the tokens for images
        inputs = _with_decoder(values, inputs)
        if values.model.device.type != "meta":
            values.run(values.model, inputs)
        return inputs
    # Make no labels for a transcription, because its loss branches on their values.
    is_transcription = "input_values" in inputs and isinstance(logits, Tensor) and logits.dim() == 3
    if not values.labels or "labels" not in values.parameters or not isinstance(logits, Tensor) or is_transcription:
        return _with_decoder(values, inputs)
    labelled = {**inputs, "labels": _labels(values, tuple(int(size) for size in logits.shape))}
    try:
        _called_without_data(values, labelled)
    except Exception:  # the labels are of another form, or the loss reads their values
        return _with_decoder(values, inputs)
    return labelled


def _with_decoder(values: Values, inputs: Inputs) -> Inputs:
    return {"decoder_input_ids": values.tokens(SEQUENCE), **inputs} if values.has_decoder else inputs


def _called_without_data(values: Values, inputs: Inputs) -> Any:
    """Return what the model returns. Layers that are built alike are run once, because they change no sizes."""
    once = dict.fromkeys(built_alike(values.model), 1)
    if once:
        with suppress(Exception), shortened(values.model, once), values.without_data(inputs) as fakes:
            return values.model(**fakes)
    with values.without_data(inputs) as fakes:
        return values.model(**fakes)


def _labels(values: Values, shape: tuple[int, ...]) -> Tensor:
    batch, *sequence, classes = shape
    if not sequence:
        # Decide this here, because transformers derives it from the labels' dtype in the first call.
        kind = "regression" if classes == 1 else "single_label_classification"
        config, device = values.config, values.model.device
        config.problem_type = getattr(config, "problem_type", None) or kind
        if config.problem_type == "regression":
            return torch.zeros(batch, *(() if classes == 1 else (classes,)), device=device)
        if config.problem_type == "multi_label_classification":
            return torch.zeros(batch, classes, device=device)
    return values.classes(classes, batch, *sequence)


def problem_type_of(config: Any, labels: Tensor) -> str | None:
    """Return the kind of loss that a classifier writes to its config in a call with labels, if it is open there.

    Args:
        config: of the model. None is returned for one that has no such field.
        labels: of the call.
    """
    if not hasattr(config, "problem_type"):
        return None
    if config.num_labels == 1:
        return "regression"
    single = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if single else "multi_label_classification"
