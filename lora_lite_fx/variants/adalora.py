"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023), https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank, WithScale
from ..adapters.maths import low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site

_AVOIDS_ZERO = 1e-5  # PEFT's, for the ranks that it prunes to nothing


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(WithDropout, WithScale, WithRank):
    """`y = W x + b + s B diag(E) A drop(x)`, `s = alpha / (r + 1e-5)`; https://arxiv.org/abs/2303.10512, equation 3.

    `E (r,)` takes the place of singular values. This is the parametrization: what the paper prunes while it trains is
    given here as ranks by site, `rank_pattern`, and files of adapters that PEFT has pruned have them. Identity at the
    start, exactly: `E = 0`.
    """

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_E",)

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + _AVOIDS_ZERO)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        drawn = partial(torch.nn.init.normal_, std=0.02)
        return {
            "lora_A": ParamSpec((self.r, site.d_in), init=drawn),
            "lora_E": ParamSpec((self.r,)),
            "lora_B": ParamSpec((site.d_out, self.r), init=drawn),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        # The small factor takes both scalings, so that nothing of the size of x is computed twice.
        return y + low_rank(self.drop(x, base), self.scale * p.lora_E[:, None] * p.lora_A, p.lora_B)
