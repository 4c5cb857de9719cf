"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024), https://arxiv.org/abs/2404.02948"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .lora import LowRank


@dataclass(frozen=True, kw_only=True)
class FromWeight(LowRank):
    """Base class of the variants that start from a part of the weight: `y = (W - s B0 A0) x + b + s B A drop(x)`.

    `A`, `B` start at `A0`, `B0`. The residual is not formed: the frozen factors are subtracted in activation space.
    The base weight stays shared and exact (tied weights, half precision, removal), loading needs no factorization,
    and at the start the two branches cancel to the last bit, where a residual rounded to the base's dtype would not.
    A weight has as many parts as its smaller side; with a larger `r` the factors have all of them, scaled as `r` says.
    """

    ties_to_weight: ClassVar[bool] = True
    takes_scale: ClassVar[tuple[str, ...]] = ("lora_B", "lora_B0")

    def start_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return `A0 (r, d_in)` and `B0 (d_out, r)` of a weight `(d_out, d_in)`; all parts, if it has fewer than r."""
        raise NotImplementedError

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = min(self.r, site.d_in, site.d_out)
        a, b = (r, site.d_in), (site.d_out, r)
        return {
            "lora_A": ParamSpec(a, trainable=self.train_A),
            "lora_B": ParamSpec(b),
            "lora_A0": ParamSpec(a, trainable=False),
            "lora_B0": ParamSpec(b, trainable=False),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        a, b = self.start_factors(weight)
        for tensor, value in ((p.lora_A, a), (p.lora_B, b), (p.lora_A0, a), (p.lora_B0, b)):
            tensor.copy_(value)

    def low_rank_change(self, p: Any) -> tuple[Tensor, Tensor]:
        b = torch.cat([p.lora_B, -p.lora_B0], dim=-1)
        return torch.cat([p.lora_A, p.lora_A0], dim=-2), self.scale * b

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        start = self.scale * low_rank(x, p.lora_A0, p.lora_B0)
        return y + (self.branch(x, base, p) - start)


@register
@dataclass(frozen=True, kw_only=True)
class PiSSA(FromWeight):
    """`y = (W - s B0 A0) x + b + s B A drop(x)`; https://arxiv.org/abs/2404.02948, equations 2 to 4.

    `A0 = sqrt(S / s) V^T` and `B0 = U sqrt(S / s)` of the top-r singular triplets of `W`; `A`, `B` start there.
    Identity at the start, exactly.
    """

    def start_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[: self.r] / self.scale).sqrt()
        return root[:, None] * vh[: self.r], u[:, : self.r] * root
