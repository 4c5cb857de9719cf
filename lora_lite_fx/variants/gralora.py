"""GraLoRA: Granular Low-Rank Adaptation (Jung et al., 2025), https://arxiv.org/abs/2505.20355"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank, WithScale
from ..adapters.maths import cast, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class GraLoRA(WithDropout, WithScale, WithRank):
    """`y = W x + b + s D drop(x)`, D of k x k blocks of rank r / k; https://arxiv.org/abs/2505.20355.

    `s = alpha / (r + hybrid_r)`. Column i of blocks has factors `A_i (d_in / k, r)`, row o has `B_o (r, d_out / k)`.
    They meet in block o, i through a part of the rank: the o-th of the k parts of `A_i`, the i-th of `B_o`. It has as
    many parameters as LoRA, and a rank of up to k r. Identity at the start, exactly: `B = 0`.

    Args:
        k: number of blocks along each side; a divisor of `r`, `d_in` and `d_out`.
        hybrid_r: rank of an ordinary LoRA added to `D`; 0 for none.
    """

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_B", "lora_hybrid_B")

    k: int = 2
    hybrid_r: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.k >= 1, f"k must be a positive integer, got {self.k}")
        self._require(self.r % self.k == 0, f"r={self.r} must be a multiple of k={self.k}: blocks have rank r / k")
        self._require(self.hybrid_r >= 0, f"hybrid_r must not be negative, got {self.hybrid_r}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            site.d_in % self.k == 0 and site.d_out % self.k == 0,
            f"k={self.k} does not divide site {site.name!r} ({site.d_out} x {site.d_in}) into equal blocks",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        d_in, d_out, r = site.d_in // self.k, site.d_out // self.k, self.hybrid_r
        bound = d_in**-0.5  # as LoRA's A, on inputs of the size of a block
        hybrid = {
            "lora_hybrid_A": ParamSpec((r, site.d_in), init="kaiming"),
            "lora_hybrid_B": ParamSpec((site.d_out, r)),
        }
        return {
            "lora_A": ParamSpec((self.k, d_in, self.r), init=lambda a: a.uniform_(-bound, bound)),
            "lora_B": ParamSpec((self.k, self.r, d_out)),
            **(hybrid if r else {}),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        x = cast(self.drop(x, base), p.lora_A)
        inner = torch.einsum("...id,idr->...ir", x.unflatten(-1, (self.k, -1)), p.lora_A)
        # Part o of what column i gives goes to row o, as its part i.
        exchanged = inner.unflatten(-1, (self.k, -1)).transpose(-3, -2).flatten(-2)
        delta = torch.einsum("...or,ord->...od", exchanged, p.lora_B).flatten(-2)
        if self.hybrid_r:
            delta = delta + low_rank(x, p.lora_hybrid_A, p.lora_hybrid_B)
        return y + self.scale * delta
