"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import cast, wide
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .lora import FromNothing


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(FromNothing):
    """`y = m / ||W + s B A|| * (W x + s B A drop(x)) + b`, norms of rows; https://arxiv.org/abs/2402.09353, equation 5.

    The norm is a constant for autograd (section 4.3 of the paper); the bias is not scaled. Identity at the start to
    rounding: `m = ||W||`.
    """

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {**super().params(site), "lora_m": ParamSpec((site.d_out,))}

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_m.copy_(self._row_norms(weight, p))

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        scale = p.lora_m / self._row_norms(base.weight, p).detach()
        result: Tensor = scale * (y + self.branch(x, base, p))
        if base.bias is not None:
            result = result + (1 - scale) * base.bias
        return result.type_as(y)

    def _row_norms(self, weight: Tensor, p: Any) -> Tensor:
        """Return `||W + s B A||` of each row, without forming the sum: `(d_out,)`, float32 or wider.

        `||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>`, row by row.
        """
        a, b = wide(p.lora_A), wide(p.lora_B)
        squares: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=a.dtype).square()
        cross = (F.linear(cast(weight, a), a) * b).sum(1)
        of_update = (F.linear(b, F.linear(a, a)) * b).sum(1)
        return (squares + 2 * self.scale * cross + self.scale**2 * of_update).clamp_min(0).sqrt()
