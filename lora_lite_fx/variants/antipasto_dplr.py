"""AntiPaSTO by a diagonal and a low rank, as lora-lite has it (Clark, 2026), https://github.com/wassname/lora-lite"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .antipasto_gain import OfDirections, gains


@register
@dataclass(frozen=True, kw_only=True)
class AntiPaSTODPLR(OfDirections):
    """`y = W x + b + U (diag(S ELU(c g)) + c B A) P x`; https://github.com/wassname/lora-lite.

    To the gains of `AntiPaSTOGain` comes a core of low rank, which mixes all directions with one another. It is not
    scaled by the singular values, so that a step of `B A` changes `W` alike in all of them. Identity at the start,
    exactly: `g = 0` and `B = 0`.

    Args:
        core_r: the rank of the core, or the number of directions at a site that has fewer.
        suppress_only: whether positive `g` count as zero, so that with `c >= 0` no gain amplifies.
    """

    core_r: int = 8
    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.core_r >= 1, f"core_r must be positive, got {self.core_r}")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = self.directions_at(site)
        k = min(self.core_r, r)
        return {
            **super().params(site),
            "lora_g": ParamSpec((r,)),
            "lora_A": ParamSpec((k, r), init="kaiming"),
            "lora_B": ParamSpec((r, k)),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        c = p.lora_shared_coefficient
        added = gains(p.lora_g, c, self.suppress_only)
        # The core is multiplied with the small factor, so that nothing of the size of x is computed twice.
        a = (p.lora_S * added)[:, None] * p.lora_P + (c * p.lora_B) @ (p.lora_A @ p.lora_P)
        return y + low_rank(x, a, p.lora_U)
