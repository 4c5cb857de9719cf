"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024), https://arxiv.org/abs/2404.02948"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..registry import register
from ..site import Site
from ..variant import FrozenLinear, ParamSpec, cast, low_rank
from .lora import LowRank


@register
@dataclass(frozen=True, kw_only=True)
class PiSSA(LowRank):
    """`y = (W - s B0 A0) x + b + s B A drop(x)`; https://arxiv.org/abs/2404.02948, equations 2 to 4.

    `A0 = sqrt(S / s) V^T` and `B0 = U sqrt(S / s)` of the top-r singular triplets of `W`; `A`, `B` start there.

    The residual is not formed: the frozen factors are subtracted in activation space. The base weight stays shared
    and exact (tied weights, half precision, removal), loading needs no SVD, and at the start the two branches
    cancel to the last bit, where a residual rounded to the base's dtype would not.
    """

    ties_to_weight: ClassVar[bool] = True

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        factors = super().params(site)
        return {
            **factors,
            "lora_A0": ParamSpec(factors["lora_A"].shape, trainable=False),
            "lora_B0": ParamSpec(factors["lora_B"].shape, trainable=False),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[: self.r] / self.scale).sqrt()
        for a, b in ((p.lora_A, p.lora_B), (p.lora_A0, p.lora_B0)):
            a.copy_(root[:, None] * vh[: self.r])
            b.copy_(u[:, : self.r] * root)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        start = self.scale * low_rank(x, p.lora_A0, p.lora_B0)
        return cast(y + (self.branch(x, base, p) - start), y)
