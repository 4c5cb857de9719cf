"""Prepare Hugging Face models for capture, and make inputs for them from their configs."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ..errors import CaptureError

# Give every dynamic dimension a size of its own, because torch.export specializes ones and may equate equal sizes.
_BATCH, _SEQUENCE = 3, 7


def is_hugging_face(model: nn.Module) -> bool:
    """Tell whether `model` is a transformers model, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def prepare_for_capture(model: Any) -> None:
    """Switch caches and checkpointing off, in place; call it on a copy.

    Raises:
        CaptureError: the model drops whole layers at random.
    """
    for module in model.modules():
        if hasattr(module, "config"):  # an encoder-decoder's stacks have configs of their own
            for switch in ("use_cache", "use_mems_eval", "use_mems_train"):  # the last two are XLNet's
                setattr(module.config, switch, False)
        if hasattr(module, "gradient_checkpointing"):  # capture loses it, and the graph does it itself
            module.gradient_checkpointing = False
    model.config.return_dict = True
    config = model.config.get_text_config()
    for switch in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, switch, 0.0):
            raise CaptureError(
                f"{type(model).__name__} drops whole layers at random in training ({switch}={getattr(config, switch)}),"
                f" which a graph cannot. The way out: set model.config.{switch} = 0."
            )


def accepted_arguments(model: Any) -> dict[str, Any]:
    """Return values of arguments that ask for what the graph of a prepared model computes anyway."""
    switches = {"use_cache": False, "return_dict": True, "logits_to_keep": 0}
    config = model.config
    outputs = ("output_attentions", "output_hidden_states", "output_router_logits")
    return switches | {name: bool(getattr(config, name, False)) for name in outputs}


def with_padding(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with padding among the tokens: some models look for it where they are given no mask."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or not isinstance(padding, int):
        return inputs
    ids = ids.clone()
    ids[0, -1] = padding
    return {**inputs, "input_ids": ids}


def with_other_mask(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return `inputs` with a mask of the other kind: with padding if it is all ones, and else all ones.

    Models may leave out masks of ones, and then compute without a mask. None without a mask, or for other models than
    those of transformers.
    """
    mask = inputs.get("attention_mask")
    if not is_hugging_face(model) or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
        return None
    other = torch.ones_like(mask)
    if bool((mask == 1).all()):
        other[0, -1] = 0
    return {**inputs, "attention_mask": other}


def input_hint(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Return what to add to example inputs for which a graph differs from its model, after a space; often empty."""
    if not _attends_by_type(model) or "token_type_ids" in inputs:
        return ""
    return " pass token_type_ids in example_inputs too, which say where tokens see those behind them,"


def _attends_by_type(model: nn.Module) -> bool:
    """Tell whether tokens see all others unless their types say otherwise, as in PaliGemma."""
    if not is_hugging_face(model) or "token_type_ids" not in inspect.signature(model.forward).parameters:
        return False
    config: Any = model.config
    return bool(getattr(config.get_text_config(), "use_bidirectional_attention", False))


def example_inputs_of(model: Any) -> dict[str, Any]:
    """Make keyword arguments for a training call of a transformers model from its config.

    `input_ids`, `attention_mask` and `labels`, as far as the model takes them; `pixel_values`, `input_values` or
    `input_features` with `labels` for models of images or sound; `input_ids` with `pixel_values` for models of both
    text and images, with `token_type_ids` where these say which tokens see those behind them. Random, but not from the
    global generator.

    Raises:
        CaptureError: the model takes none of these.
    """
    parameters = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def tokens(vocabulary: int) -> Tensor:
        shape = (_BATCH, _SEQUENCE)
        return torch.randint(vocabulary, shape, generator=generator).to(model.device)

    def images(config: Any) -> Tensor:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_BATCH, getattr(config, "num_channels", 3), height, width)
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, Any] = {}
    if model.main_input_name == "input_ids" and "input_ids" in parameters:
        inputs["input_ids"] = tokens(config.vocab_size)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones(_BATCH, _SEQUENCE, dtype=torch.long, device=model.device)
        if model.config.is_encoder_decoder and "labels" not in parameters:
            inputs["decoder_input_ids"] = tokens(config.vocab_size)
        vision = getattr(model.config, "vision_config", None)
        if "pixel_values" in parameters and hasattr(vision, "image_size"):
            inputs["pixel_values"] = images(vision)
            _mark_images(model, inputs)
    elif model.main_input_name == "pixel_values":
        inputs["pixel_values"] = images(model.config)
    elif model.main_input_name == "input_features" and hasattr(model.config, "max_source_positions"):
        # Whisper takes a spectrogram of a fixed length, and its convolutions halve it once.
        shape = (_BATCH, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator).to(model.device, model.dtype)
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


def decide_problem_type(config: Any, labels: Tensor) -> None:
    """Set the kind of loss in the config of a classifier that leaves it open, in place, as its first call would.

    Some models read the values of the labels as long as it is open, which a graph cannot.
    """
    if getattr(config, "problem_type", None) is not None:
        return
    if config.num_labels == 1:
        config.problem_type = "regression"
    else:
        multiple = labels.is_floating_point()
        config.problem_type = "multi_label_classification" if multiple else "single_label_classification"


def _mark_images(model: Any, inputs: dict[str, Any]) -> None:
    """Put the token that stands for a part of an image into `input_ids`, as often as an image has parts, in place."""
    token = getattr(model.config, "image_token_id", None)
    if token is None or not hasattr(model, "get_image_features"):
        return
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
    features = getattr(features, "pooler_output", features)
    parts = sum(math.prod(image.shape[:-1]) for image in features) // _BATCH
    text = inputs["input_ids"].where(inputs["input_ids"] != token, 0 if token else 1)
    inputs["input_ids"] = torch.cat([text[:, :1], torch.full((_BATCH, parts), token), text[:, 1:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if _attends_by_type(model):
        inputs["token_type_ids"] = (inputs["input_ids"] != token).long()


def _without_data(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Run `model` on fake tensors, and return what it returns: only the shapes are of interest."""
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        model.set_experts_implementation("batched_mm")  # the default has no shapes without data
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return model(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)


def _labels(model: Any, inputs: dict[str, Any], generator: torch.Generator) -> Tensor | None:
    """Make labels that fit the model's logits; None if it has no logits, or they cannot be made."""
    shapes = dict(inputs)
    if model.config.is_encoder_decoder:
        shapes["decoder_input_ids"] = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long, device=model.device)
    try:
        logits = getattr(_without_data(model, shapes), "logits", None)
    except DataDependentOutputException:  # the model compares what its inputs hold, as the count of image tokens
        return None
    # Make no labels for a transcription, because its loss branches on their values.
    if not isinstance(logits, Tensor) or ("input_values" in inputs and logits.dim() == 3):
        return None
    sequence = tuple(int(size) for size in logits.shape[1:-1])
    classes = int(logits.shape[-1])
    if logits.dim() == 2:
        # Decide this here, because transformers derives it from the labels' dtype in the first call.
        regression = classes == 1
        model.config.problem_type = model.config.problem_type or (
            "regression" if regression else "single_label_classification"
        )
        if model.config.problem_type == "regression":
            return torch.zeros(_BATCH, *(() if regression else (classes,)), device=model.device)
        if model.config.problem_type == "multi_label_classification":
            return torch.zeros(_BATCH, classes, device=model.device)
    return torch.randint(classes, (_BATCH, *sequence), generator=generator).to(model.device)
