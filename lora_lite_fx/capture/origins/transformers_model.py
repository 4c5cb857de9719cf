"""Prepare Hugging Face models for capture, and vary inputs of theirs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CaptureError
from ...graph.sharded import is_dtensor
from ..differences import TOLERANCES, distance, largest
from ..inputs.parts import attends_by_type
from ..outputs import Call, has_data, outputs_of_model


def is_hugging_face(model: nn.Module) -> bool:
    """Tell whether `model` is a transformers model, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def is_diffusers(model: object) -> bool:
    """Tell whether `model` is a model of diffusers (a UNet, a transformer), without importing diffusers."""
    models = sys.modules.get("diffusers.models.modeling_utils")
    return models is not None and isinstance(model, models.ModelMixin)


def new_head(model: Any) -> tuple[str, ...]:
    """Return the names of the modules of a task's head whose weights were drawn at random, not read from a checkpoint.

    The head of a task is what a transformers model has outside of its `base_model`, unless it predicts tokens. Nothing
    public tells which weights `from_pretrained` drew. But it draws biases as zeros, which no training leaves so, and
    `config.architectures` names the class that a checkpoint was saved from.

    Args:
        model: a model of transformers.
    """
    try:
        if model.get_output_embeddings() is not None:
            return ()
    except (AttributeError, NotImplementedError):  # of a class that does not say
        return ()
    of_base = set(model.base_model.modules())
    saved = type(model).__name__ in (model.config.architectures or ())
    heads = ((name, module) for name, module in model.named_modules() if module not in of_base)
    return tuple(name for name, module in heads if _multiplies(module) and _is_drawn(module, saved))


def _multiplies(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _is_drawn(module: nn.Module, saved: bool) -> bool:
    """Check whether the weight of a module was drawn, given whether its model was saved in the class that it has."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor) or is_dtensor(bias) or not has_data(module, ((), {})):
        return not saved
    return not bool(bias.any())


def prepare_for_capture(model: Any) -> None:
    """Switch caches and checkpointing off, in place; call it on a copy.

    Raises:
        CaptureError: the model drops whole layers at random, masks random spans by numpy (SpecAugment), or
            changes its weights in evaluation (RWKV) or in training (Gemma 3n).
    """
    from ...compat.transformers import experts_of, set_experts, tells_experts

    leave_out_clamps(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):  # an encoder-decoder's stacks have configs of their own
            for switch in ("use_cache", "use_mems_eval", "use_mems_train"):  # the last two are XLNet's
                setattr(config, switch, False)
            if tells_experts(config) and experts_of(config) in (None, "eager"):  # a loop over those that tokens chose
                set_experts(config, "grouped_mm")
    forget_checkpointing(model)
    model.config.return_dict = True
    config = model.config.get_text_config()
    for switch in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, switch, 0.0):
            raise CaptureError(
                f"{type(model).__name__} drops whole layers at random in training ({switch}={getattr(config, switch)}),"
                f" which a graph cannot. The way out: set model.config.{switch} = 0."
            )
    for name, module in model.named_modules():
        if isinstance(chance := getattr(module, "layerdrop", 0.0), (int, float)) and chance > 0:
            raise CaptureError(
                f"{type(model).__name__} drops whole layers of {name} at random in training (layerdrop={chance}), which"
                f" a graph cannot. The way out: set model.get_submodule({name!r}).layerdrop = 0."
            )
    if every := getattr(model.config, "rescale_every", 0):
        raise CaptureError(
            f"{type(model).__name__} divides its own weights in evaluation (rescale_every={every}),"
            " which a graph cannot. The way out: set model.config.rescale_every = 0."
        )
    spans = [name for name in ("mask_time_prob", "mask_feature_prob") if getattr(model.config, name, 0.0)]
    if spans and getattr(model.config, "apply_spec_augment", True):
        raise CaptureError(
            f"{type(model).__name__} masks random spans of its input by numpy in training"
            f" ({spans[0]}={getattr(model.config, spans[0])}), which a graph cannot. The way out: set"
            " model.config.apply_spec_augment = False."
        )


def require_same_without_caches(model: Any, prepared: Any, call: Call) -> None:
    """Check that an encoder with a decoder computes the same in evaluation without the caches that it is set to use.

    FSMT takes a call with caches for one token of a decoder, and leaves out its causal mask.

    Raises:
        CaptureError: it does not.
    """
    if not (model.config.is_encoder_decoder and getattr(model.config, "use_cache", False) and has_data(model, call)):
        return
    try:
        expected = outputs_of_model(model, call, False, (), by_module=False).results
        actual = outputs_of_model(prepared, call, False, (), by_module=False).results
    except Exception:  # of one of the two
        return
    for path, value in actual.items():
        if isinstance(value, Tensor) and path in expected:
            allowed = TOLERANCES.get(value.dtype, 0.0) * largest(value)
            if distance(value, expected[path]) > allowed:
                raise CaptureError(
                    f"{type(model).__name__} computes another {path} with caches than without, and graphs are captured"
                    " without. The way out: set model.config.use_cache = False, or pass example_inputs with labels, if"
                    " those are the calls of which it is meant."
                )


def leave_out_clamps(model: nn.Module) -> None:
    """Switch off, in place, that Gemma 3n clamps weights in training; call it on a copy.

    It clamps one weight in place, and calls one linear by its weight alone, which would leave out an adapter. Safe
    because the weights are frozen, and are within the limits.

    Raises:
        CaptureError: a weight is beyond its limit.
    """
    configs = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        clip = getattr(config, "altup_coef_clip", None)
        if clip is None or not hasattr(module, "prediction_coefs"):
            continue
        configs[id(config)] = config
        for part in ("prediction_coefs", "correction_coefs"):
            weight = module.get_submodule(part).weight
            if isinstance(weight, Tensor) and not weight.is_meta and bool((weight.abs() > clip).any()):
                raise CaptureError(
                    f"{type(model).__name__} clamps {name}.{part}.weight in training to values up to {clip}"
                    " (altup_coef_clip), which a graph cannot. The way out: clamp the weight before."
                )
    for config in configs.values():
        vars(config)["altup_coef_clip"] = None  # past the check of the field, which takes numbers only


def forget_checkpointing(model: nn.Module) -> None:
    """Switch checkpointing off, in place, because capture loses it, and the graph does it itself."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]


def accepted_arguments(model: Any) -> dict[str, Any]:
    """Return values of arguments that ask for what the graph of a prepared model computes anyway."""
    switches = {"use_cache": False, "return_dict": True, "logits_to_keep": 0}
    config = model.config
    outputs = ("output_attentions", "output_hidden_states", "output_router_logits")
    return switches | {name: bool(getattr(config, name, False)) for name in outputs}


def batch_only_arguments(model: nn.Module) -> tuple[str, ...]:
    """Return the arguments of which the batch alone is to be dynamic: images of models that cut them into windows.

    Such a model pads and rolls by remainders of height and width. With those left open a capture takes minutes.
    """
    config = getattr(model, "config", None) if is_hugging_face(model) else None
    vision, backbone = getattr(config, "vision_config", None), getattr(config, "backbone_config", None)
    configs = (config, vision, backbone, getattr(vision, "backbone_config", None))
    cuts = any(getattr(each, name, None) is not None for each in configs for name in _WINDOWS)
    return ("pixel_values",) if cuts else ()


_WINDOWS = (
    "window_size",
    "window_size_per_stage",
    "sr_ratios",
    "sequence_reduction_ratios",
    "focal_windows",
    "masked_unit_size",
)


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

    Models may leave out masks of ones, and then compute without a mask. None without a mask or its values, or for other
    models than those of transformers.
    """
    mask = inputs.get("attention_mask")
    if not is_hugging_face(model) or not isinstance(mask, Tensor) or mask.is_meta:
        return None
    if mask.dim() != 2 or mask.shape[1] < 2:
        return None
    other = torch.ones_like(mask)
    if bool((mask == 1).all()):
        other[0, -1] = 0
    return {**inputs, "attention_mask": other}


def input_hint(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Return what to do about example inputs for which a graph differs from its model, after a space; often empty."""
    if not is_hugging_face(model):
        return ""
    if attends_by_type(model) and "token_type_ids" not in inputs:
        return " pass token_type_ids in example_inputs too, which say where tokens see those behind them,"
    config: Any = model.config
    from ...compat.transformers import attention_of

    if attention_of(config) != "sdpa":
        return ""
    # Sdpa leaves out masks of ones, in calls that are neither traced nor compiled. Some models see all tokens then.
    hint = ""
    if "attention_mask" in inputs:
        hint += ' call model.set_attn_implementation("eager") first, because sdpa leaves out masks of ones,'
    if getattr(config, "is_causal", True) and any(
        getattr(each, "is_causal", True) is False for each in model.modules()
    ):
        hint += " set model.config.is_causal = False if tokens are to see those behind them,"
    return hint
