"""Blocks that ask for what a process or a call says, for the account. See `blocks.py` for those of random nets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.blocks import block
from tests.fuzz.modules import HuggingFace, Plain


@block
class AsksDtype(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x + (torch.tensor(2.0**24 + 1) - 2.0**24).to(x.dtype)  # float32 has no such number


@block
class AsksDeterminism(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x * (2.0 if torch.are_deterministic_algorithms_enabled() else 1.0)


class Scaled(Plain):
    """A net with an argument that may be left out."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if scale is None else y * scale


class ScaledHuggingFace(HuggingFace):
    """The same as a model of transformers."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if scale is None else y * scale
