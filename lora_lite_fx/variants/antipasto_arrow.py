"""AntiPaSTO by an arrowhead, as lora-lite has it (Clark, 2026), https://github.com/wassname/lora-lite"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .antipasto_gain import OfDirections, gains


@register
@dataclass(frozen=True, kw_only=True)
class AntiPaSTOArrow(OfDirections):
    """`y = W x + b + U C diag(S) P x`, `C = [[c M, 0], [0, diag(ELU(c g))]]`; https://github.com/wassname/lora-lite.

    `M` mixes the first directions of `W` with one another, the largest; the others have gains as of `AntiPaSTOGain`.
    Identity at the start, exactly: `M = 0` and `g = 0`.

    Args:
        block_size: the number of the directions that `M` mixes; all, and no gains, at a site that has no more.
        suppress_only: whether positive `g` count as zero, so that with `c >= 0` no gain amplifies.
    """

    block_size: int = 8
    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.block_size >= 1, f"block_size must be positive, got {self.block_size}")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self.directions_at(site)
        size = min(self.block_size, r)
        gained = {"lora_g": ParamSpec((r - size,))} if size < r else {}
        return {**super().params(site), "lora_M": ParamSpec((size, size)), **gained}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        # The core scales and mixes the rows of the small factor, so that nothing of the size of x is computed twice.
        rows = p.lora_S[:, None] * p.lora_P
        r = self.directions_at(base.site)
        size = min(self.block_size, r)
        a = (p.lora_shared_coefficient * p.lora_M) @ rows[:size]
        if size < r:
            added = gains(p.lora_g, p.lora_shared_coefficient, self.suppress_only)
            a = torch.cat([a, added[:, None] * rows[size:]])
        return y + low_rank(x, a, p.lora_U)
