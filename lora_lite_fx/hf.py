"""What capture has to know of Hugging Face transformers: inputs made from a model's config, and its switches."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import CaptureError

# Every dynamic dimension is shown with a size of its own: torch.export specialises ones, and may equate equals.
_BATCH, _SEQUENCE = 3, 7


def is_hugging_face(model: nn.Module) -> bool:
    """Whether `model` is a transformers model; transformers is not imported for that."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def prepare_for_capture(model: Any) -> None:
    """Set the model's switches for the training signature, in place: call it on a copy."""
    for module in model.modules():  # an encoder-decoder's stacks have configs of their own
        if hasattr(module, "config"):
            module.config.use_cache = False
    model.config.return_dict = True
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn(
            f"{type(model).__name__}: gradient checkpointing is lost by capture; the graph saves all activations.",
            stacklevel=4,
        )
        model.gradient_checkpointing_disable()
    config = model.config.get_text_config()
    for switch in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, switch, 0.0):
            raise CaptureError(
                f"{type(model).__name__} drops whole layers at random in training ({switch}={getattr(config, switch)}),"
                f" which a graph cannot. The way out: set model.config.{switch} = 0."
            )


def example_inputs_of(model: Any) -> dict[str, Any]:
    """Keyword arguments for the training signature of a transformers model, made from its config.

    `input_ids`, `attention_mask` and `labels`, what the model has of them; `pixel_values` or `input_values` with
    `labels` for models of images or sound. Random, but not from the global generator.

    Raises:
        CaptureError: the model takes none of these.
    """
    parameters = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def tokens(vocabulary: int) -> Tensor:
        shape = (_BATCH, _SEQUENCE)
        return torch.randint(vocabulary, shape, generator=generator).to(model.device)

    inputs: dict[str, Any] = {}
    if model.main_input_name == "input_ids" and "input_ids" in parameters:
        inputs["input_ids"] = tokens(config.vocab_size)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones(_BATCH, _SEQUENCE, dtype=torch.long, device=model.device)
        if model.config.is_encoder_decoder and "labels" not in parameters:
            inputs["decoder_input_ids"] = tokens(config.vocab_size)
    elif model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_BATCH, getattr(model.config, "num_channels", 3), height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    elif model.main_input_name == "input_values":
        inputs["input_values"] = torch.randn(_BATCH, 4000, generator=generator).to(model.device, model.dtype)
    else:
        raise CaptureError(
            f"No inputs can be made for {type(model).__name__}, whose main input is {model.main_input_name!r}."
            " The way out: pass example_inputs={...}."
        )
    if "labels" in parameters:
        labels = _labels(model, inputs, generator)
        if labels is not None:
            inputs["labels"] = labels
    return inputs


def _labels(model: Any, inputs: dict[str, Any], generator: torch.Generator) -> Tensor | None:
    """Labels that fit the model's logits, or None if it has none."""
    shapes = dict(inputs)
    if model.config.is_encoder_decoder:
        shapes["decoder_input_ids"] = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long, device=model.device)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        logits = getattr(model(**shapes), "logits", None)
    if not isinstance(logits, Tensor):
        return None
    sequence = tuple(int(size) for size in logits.shape[1:-1])
    classes = int(logits.shape[-1])
    if logits.dim() == 2:
        # transformers derives this from the labels' dtype on the first call, which is a branch on data.
        regression = classes == 1
        model.config.problem_type = model.config.problem_type or (
            "regression" if regression else "single_label_classification"
        )
        if model.config.problem_type == "regression":
            return torch.zeros(_BATCH, *(() if regression else (classes,)), device=model.device)
        if model.config.problem_type == "multi_label_classification":
            return torch.zeros(_BATCH, classes, device=model.device)
    return torch.randint(classes, (_BATCH, *sequence), generator=generator).to(model.device)
