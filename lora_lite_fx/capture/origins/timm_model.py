"""A model of timm: example images from what it says about them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.torch import FakeTensorMode
from ..forward_signature import signature_of
from ..quirks.all_quirks import without_data
from .origin import PlainModule


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
