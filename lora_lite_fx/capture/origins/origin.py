"""What capture has to know of where a model comes from."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.torch import FakeTensorMode
from ..forward_signature import signature_of
from ..outputs import Call
from ..quirks.all_quirks import without_data


def is_hugging_face(model: object) -> bool:
    """Tell whether `model` is a transformers model, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def is_diffusers(model: object) -> bool:
    """Tell whether `model` is a model of diffusers (a UNet, a transformer), without importing diffusers."""
    models = sys.modules.get("diffusers.models.modeling_utils")
    return models is not None and isinstance(model, models.ModelMixin)


class PlainModule:
    """A module of which nothing is known. Each subclass says what is special about the models of a library.

    Args:
        model: of the user, which is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prepare(self, copied: nn.Module) -> None:
        """Switch off in `copied`, a copy of the model, what a graph cannot have.

        Raises:
            CaptureError: it cannot be switched off without a change of results; the message says how.
        """

    def example_inputs(self, copied: nn.Module, without: Collection[str] = ()) -> dict[str, Any] | None:
        """Return keyword arguments to capture the prepared copy with; None if nothing tells any.

        Args:
            copied: the prepared copy.
            without: `"images"` or `"sound"` to leave them out, also where the model takes them.
        """
        return None

    def left_out_in_turn(self) -> tuple[tuple[str, ...], ...]:
        """Return which of images and sound `example_inputs` may go without, the least first."""
        return ()

    def check_call(self, prepared: nn.Module, call: Call) -> None:
        """Raise `CaptureError` if the prepared copy computes something else for a call than the model."""

    def with_other_mask(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return keyword arguments with a mask of the other kind, for which the graph has to hold too; or None."""
        return None

    def layouts(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return those of the arguments whose values become a part of the graph because they say how images lie."""
        return {}

    def batch_only(self, made: bool) -> tuple[str, ...]:
        """Return the names of the arguments of which the batch alone is to be dynamic.

        Args:
            made: whether `example_inputs` made them.
        """
        return ()

    def accepted(self) -> dict[str, Any]:
        """Return values of arguments that ask for what the graph computes anyway; a call may pass them."""
        return {}

    def hint(self, inputs: Mapping[str, Any]) -> str:
        """Return what to do about inputs for which a graph differs from the model, after a space; often empty."""
        return ""


class DiffusersModel(PlainModule):
    """A model of diffusers."""

    def prepare(self, copied: nn.Module) -> None:
        """Switch checkpointing off."""
        forget_checkpointing(copied)


def forget_checkpointing(model: nn.Module) -> None:
    """Switch checkpointing off, in place, because capture loses it, and the graph does it itself."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]


class TimmModel(PlainModule):
    """A model that has what timm gives each, with or without published weights: a dict `pretrained_cfg`."""

    model: Any

    def example_inputs(self, copied: Any, without: Collection[str] = ()) -> dict[str, Any] | None:
        """Return two random images of the size that the model takes, as its first argument.

        None for a model that says the size of other images than it takes.
        """
        size = copied.pretrained_cfg.get("input_size")
        if not isinstance(size, (tuple, list)) or len(size) != 3:
            return None
        # It says what its published weights were trained on; a model may be made for other images.
        convolution = next((module for module in copied.modules() if isinstance(module, nn.Conv2d)), None)
        channels = size[0] if convolution is None else convolution.in_channels
        height, width = getattr(getattr(copied, "patch_embed", None), "img_size", None) or size[1:]
        weight = next((tensor for tensor in copied.parameters() if tensor.is_floating_point()), torch.zeros(()))
        images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
        images = images.to(weight.device, weight.dtype)
        return {self._first_argument(): images} if _takes(copied.eval(), images) else None

    def batch_only(self, made: bool) -> tuple[str, ...]:
        """Return the images, where the model takes those of one height and width alone or nothing shows others."""
        return (self._first_argument(),) if made or self.model.pretrained_cfg.get("fixed_input_size") else ()

    def _first_argument(self) -> str:
        return next(iter(signature_of(self.model).parameters))


def _takes(model: nn.Module, images: Tensor) -> bool:
    """Tell whether the model runs on these images, without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), without_data(model, mode):
            model(mode.from_tensor(images))
    except Exception:
        return False
    return True
