"""AntiPaSTO by ablation, as lora-lite has it (Clark, 2026), https://github.com/wassname/lora-lite"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .antipasto_gain import OfDirections


@register
@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblate(OfDirections):
    """`y = W x + b - c U Q diag(alpha) Q^T diag(S) P x`, Q orthonormal; https://github.com/wassname/lora-lite.

    What `W` puts out along k trained directions is taken away, the share `alpha (k,)` of it, from 0 to 1. `Q (r, k)` is
    `q (r, k)`, orthonormalized: the directions, within the r of `W`. So with `c` from 0 to 1 nothing is amplified.
    This is the trained form of directional ablation (https://arxiv.org/abs/2406.11717). Near identity at the start: a
    little is taken away along random directions, because `alpha = 0` would leave the gradient of `q` zero.

    Args:
        directions: k, or the number of directions at a site that has fewer.
        strength: what `alpha` starts at.
    """

    directions: int = 1
    strength: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.directions >= 1, f"directions must be positive, got {self.directions}")
        self._require(
            0 < self.strength <= 1, f"strength is above 0, where gradients vanish, and at most 1, got {self.strength!r}"
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self.directions_at(site)
        k = min(self.directions, r)
        return {
            **super().params(site),
            "lora_q": ParamSpec((r, k), init=partial(torch.nn.init.normal_, std=r**-0.5)),
            "lora_alpha": ParamSpec((k,), init=self.strength),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        # In double precision, because autocast leaves it alone.
        q = torch.linalg.qr(p.lora_q.double()).Q.to(p.lora_q.dtype)
        taken = p.lora_shared_coefficient * p.lora_alpha.clamp(0, 1)
        return y - low_rank(x, (q * taken).t() @ (p.lora_S[:, None] * p.lora_P), p.lora_U @ q)
