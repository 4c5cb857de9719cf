"""Make example inputs for a model of timm from what it says about images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.torch import FakeTensorMode
from ..forward_signature import signature_of
from ..without_data import without_data


def example_images_of(model: nn.Module) -> dict[str, Any] | None:
    """Return two random images of the size that a timm model takes, as its first argument.

    Args:
        model: a copy of the user's, left in evaluation mode.

    Returns:
        None for other models, and for a timm model that says the size of other images than it takes.
    """
    size = _images(model).get("input_size")
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    # It says what its published weights were trained on; a model may be made for other images.
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = size[0] if convolution is None else convolution.in_channels
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
    weight = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.zeros(()))
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(weight.device, weight.dtype)
    if not _takes(model.eval(), images):
        return None
    return {next(iter(signature_of(model).parameters)): images}


def images_of_one_size(model: nn.Module) -> tuple[str, ...]:
    """Return the name of the images of a timm model that takes those of one height and width alone."""
    fixed = _images(model).get("fixed_input_size")
    return tuple(signature_of(model).parameters)[:1] if fixed else ()


def _images(model: nn.Module) -> Mapping[str, Any]:
    """Return what a model says about its images: timm gives each a `pretrained_cfg`, with or without such weights."""
    said = getattr(model, "pretrained_cfg", None)
    return said if isinstance(said, Mapping) else {}


def _takes(model: nn.Module, images: Tensor) -> bool:
    """Tell whether the model runs on these images, without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), without_data(model, mode):
            model(mode.from_tensor(images))
    except Exception:
        return False
    return True
