"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Büyükakyüz, 2024), https://arxiv.org/abs/2406.01775"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.registry import register
from .pissa import FromWeight


@register
@dataclass(frozen=True, kw_only=True)
class OLoRA(FromWeight):
    """`y = (W - s B0 A0) x + b + s B A drop(x)`; https://arxiv.org/abs/2406.01775, algorithm 1.

    `B0 = Q[:, :r]` and `A0 = R[:r]` of the QR factorization `W = Q R`; `A`, `B` start there. Identity at the start,
    exactly.
    """

    def start_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return r[: self.r], q[:, : self.r]
