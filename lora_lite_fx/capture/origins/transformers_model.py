"""A model of transformers: the switches that capture needs, its example inputs, and how its calls vary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CaptureError
from ...graph.sharded import is_dtensor
from ...graph.tensors import has_values
from ..comparable import revealed
from ..differences import agree
from ..inputs.example_inputs import example_inputs_of, what_may_be_left_out
from ..inputs.parts import attends_by_type
from ..outputs import Call, has_data, outputs_of_model
from ..quirks.layouts import layouts_in
from ..shared_copy import shared_copy
from .origin import PlainModule, forget_checkpointing

_CACHES = ("use_cache", "use_mems_eval", "use_mems_train")
"""The switches of a config for caches; the last two are XLNet's."""
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_WINDOWS = (
    "window_size",
    "window_size_per_stage",
    "sr_ratios",
    "sequence_reduction_ratios",
    "focal_windows",
    "masked_unit_size",
)


class TransformersModel(PlainModule):
    """A model of transformers."""

    model: Any

    def prepare(self, copied: Any) -> None:
        """Switch caches and checkpointing off, in place.

        Raises:
            CaptureError: the model drops whole layers at random, masks random spans by numpy (SpecAugment), or changes
                its weights in evaluation (RWKV) or in training (Gemma 3n).
        """
        from ...compat.transformers import experts_of, set_experts, tells_experts

        leave_out_clamps(copied)
        for module in copied.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "to_dict"):  # an encoder-decoder's stacks have configs of their own
                for switch in _CACHES:
                    setattr(config, switch, False)
                if tells_experts(config) and experts_of(config) in (None, "eager"):  # a loop over those chosen
                    set_experts(config, "grouped_mm")
        forget_checkpointing(copied)
        copied.config.return_dict = True
        self._refuse_what_no_graph_can(copied)

    def _refuse_what_no_graph_can(self, copied: Any) -> None:
        def refuse(what: str, setting: str, value: Any, way_out: str) -> None:
            raise CaptureError(
                f"{type(copied).__name__} {what} ({setting}={value}), which a graph cannot. The way out: set {way_out}."
            )

        config = copied.config
        text = config.get_text_config()
        for switch in _LAYERDROP:
            if chance := getattr(text, switch, 0.0):
                refuse("drops whole layers at random in training", switch, chance, f"model.config.{switch} = 0")
        for name, module in copied.named_modules():
            if isinstance(chance := getattr(module, "layerdrop", 0.0), (int, float)) and chance > 0:
                way_out = f"model.get_submodule({name!r}).layerdrop = 0"
                refuse(f"drops whole layers of {name} at random in training", "layerdrop", chance, way_out)
        if every := getattr(config, "rescale_every", 0):
            way_out = "model.config.rescale_every = 0"
            refuse("divides its own weights in evaluation", "rescale_every", every, way_out)
        if getattr(config, "apply_spec_augment", True):
            for name in ("mask_time_prob", "mask_feature_prob"):
                if chance := getattr(config, name, 0.0):
                    way_out = "model.config.apply_spec_augment = False"
                    refuse("masks random spans of its input by numpy in training", name, chance, way_out)

    def example_inputs(self, copied: nn.Module, without: Collection[str] = ()) -> dict[str, Any] | None:
        """Make inputs from the config; the arguments are those of `PlainModule.example_inputs`."""
        return example_inputs_of(copied, without)

    def left_out_in_turn(self) -> tuple[tuple[str, ...], ...]:
        """Return what `example_inputs` may go without, as far as the model takes it."""
        return what_may_be_left_out(self.model)

    def check_call(self, prepared: Any, call: Call) -> None:
        """Check that an encoder with a decoder computes in evaluation without caches what it does with them.

        FSMT takes a call with caches for one token of a decoder, and leaves out its causal mask.

        Raises:
            CaptureError: it is set to use caches, and does not.
        """
        config = self.model.config
        if not (config.is_encoder_decoder and getattr(config, "use_cache", False) and has_data(self.model, call)):
            return
        plain = shared_copy(self.model)
        try:
            with revealed(plain, prepared):
                expected = outputs_of_model(plain, call, False).results
                actual = outputs_of_model(prepared, call, False).results
        except Exception:  # of one of the two
            return
        for path, value in actual.items():
            if isinstance(value, Tensor) and path in expected and not agree(expected[path], value):
                raise CaptureError(
                    f"{type(self.model).__name__} computes another {path} with caches than without, and graphs are"
                    " captured without. The way out: set model.config.use_cache = False, or pass example_inputs with"
                    " labels, if those are the calls of which it is meant."
                )

    def with_other_mask(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return `inputs` with a mask with padding if theirs is all ones, and else with one of ones.

        Models may leave out masks of ones, and then compute without a mask. None without a mask or its values.
        """
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or not has_values(mask) or mask.dim() != 2 or mask.shape[1] < 2:
            return None
        other = torch.ones_like(mask)
        if bool((mask == 1).all()):
            other[0, -1] = 0
        return {**inputs, "attention_mask": other}

    def layouts(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the grids of patches and the sizes of images."""
        return layouts_in(inputs)

    def batch_only(self, made: bool) -> tuple[str, ...]:
        """Return the images of models that cut them into windows.

        Such a model pads and rolls by remainders of height and width. With those left open a capture takes minutes.
        """
        config = self.model.config
        vision, backbone = getattr(config, "vision_config", None), getattr(config, "backbone_config", None)
        configs = (config, vision, backbone, getattr(vision, "backbone_config", None))
        cuts = any(getattr(each, name, None) is not None for each in configs for name in _WINDOWS)
        return ("pixel_values",) if cuts else ()

    def accepted(self) -> dict[str, Any]:
        """Return the switches as `prepare` sets them, and the outputs that the config asks for."""
        outputs = ("output_attentions", "output_hidden_states", "output_router_logits")
        asked = {name: bool(getattr(self.model.config, name, False)) for name in outputs}
        return {"use_cache": False, "return_dict": True, "logits_to_keep": 0, **asked}

    def hint(self, inputs: Mapping[str, Any]) -> str:
        """Return what to do about masks that the model makes otherwise in calls."""
        if attends_by_type(self.model) and "token_type_ids" not in inputs:
            return " pass token_type_ids in example_inputs too, which say where tokens see those behind them,"
        from ...compat.transformers import attention_of

        config = self.model.config
        if attention_of(config) != "sdpa":
            return ""
        # Sdpa leaves out masks of ones, in calls that are neither traced nor compiled. Some models see all tokens then.
        hint = ""
        if "attention_mask" in inputs:
            hint += ' call model.set_attn_implementation("eager") first, because sdpa leaves out masks of ones,'
        sees_behind = any(getattr(module, "is_causal", True) is False for module in self.model.modules())
        if getattr(config, "is_causal", True) and sees_behind:
            hint += " set model.config.is_causal = False if tokens are to see those behind them,"
        return hint


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
            if isinstance(weight, Tensor) and has_values(weight) and bool((weight.abs() > clip).any()):
                raise CaptureError(
                    f"{type(model).__name__} clamps {name}.{part}.weight in training to values up to {clip}"
                    " (altup_coef_clip), which a graph cannot. The way out: clamp the weight before."
                )
    for config in configs.values():
        vars(config)["altup_coef_clip"] = None  # past the check of the field, which takes numbers only


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
    if not isinstance(bias, Tensor) or is_dtensor(bias) or not has_data(module):
        return not saved
    return not bool(bias.any())
