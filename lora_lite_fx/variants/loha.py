"""LoHa: FedPara, Low-rank Hadamard Product (Nam et al., 2021), https://arxiv.org/abs/2108.06098"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank, WithScale
from ..adapters.maths import cast, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class LoHa(WithScale, WithRank):
    """`y = W x + b + s (B1 A1 * B2 A2) x`, elementwise, `s = alpha / r`; https://arxiv.org/abs/2108.06098.

    The elementwise product of two matrices of rank r has rank up to r^2. Identity at the start, exactly: `A2 = 0`.
    """

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_A1": ParamSpec((self.r, site.d_in), init="kaiming"),
            "lora_B1": ParamSpec((site.d_out, self.r), init="kaiming"),
            "lora_A2": ParamSpec((self.r, site.d_in)),
            "lora_B2": ParamSpec((site.d_out, self.r), init="kaiming"),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        d_in, d_out = base.site.d_in, base.site.d_out
        if self.r**2 * (d_in + d_out) < d_in * d_out:
            # The product is one of factors of rank r^2: all products of a row of A1 and one of A2, of columns of B.
            a = (p.lora_A1[:, None] * p.lora_A2).flatten(0, 1)
            b = (p.lora_B1[:, :, None] * p.lora_B2[:, None]).flatten(1)
            delta = low_rank(x, a, b)
        else:  # at such ranks the matrix itself is smaller
            weight = (p.lora_B1 @ p.lora_A1) * (p.lora_B2 @ p.lora_A2)
            delta = F.linear(cast(x, weight), weight)
        return y + self.alpha / self.r * delta
