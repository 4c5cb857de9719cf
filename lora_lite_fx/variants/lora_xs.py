"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Bałazy et al., 2024), https://arxiv.org/abs/2405.17604"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank, WithScale
from ..adapters.maths import cast, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site

_DEVIATION = 1e-5  # of `R` at the start, the paper's


@register
@dataclass(frozen=True, kw_only=True)
class LoRAXS(WithDropout, WithScale, WithRank):
    """`y = W x + b + s B R A drop(x)`, `s = alpha / r`; https://arxiv.org/abs/2405.17604.

    `A = S V^T` and `B = U` are those of the r largest singular triplets of `W`, or of all if it has fewer, and frozen.
    Trained is `R` between them, r x r numbers whatever the size of the weight. Near identity at the start: `R` is drawn
    with the standard deviation 1e-5.
    """

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_R",)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        r = min(self.r, site.d_in, site.d_out)
        return {
            "lora_A": ParamSpec((r, site.d_in), trainable=False),
            "lora_B": ParamSpec((site.d_out, r), trainable=False),
            "lora_R": ParamSpec((r, r), init=partial(torch.nn.init.normal_, std=_DEVIATION)),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        r = len(p.lora_R)
        p.lora_A.copy_(s[:r, None] * vh[:r])
        p.lora_B.copy_(u[:, :r])

    def low_rank_change(self, p: Any) -> tuple[Tensor, Tensor]:
        return p.lora_A, self.scale * p.lora_B @ p.lora_R

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        inside = F.linear(cast(self.drop(x, base), p.lora_A), p.lora_A)  # (..., r)
        return y + low_rank(inside, self.scale * p.lora_R, p.lora_B)
