"""HiRA: Hadamard High-Rank Adaptation (Huang et al., 2025), https://openreview.net/forum?id=TwJrTz9cRS"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .lora import how_drawn


@register
@dataclass(frozen=True, kw_only=True)
class HiRA(WithDropout, WithRank):
    """`y = W x + b + (W * B A) drop(x)`, elementwise; https://openreview.net/forum?id=TwJrTz9cRS.

    The rank of the update is up to r times that of `W`, so it is formed as a matrix. Identity at the start, exactly:
    `B = 0`.

    Args:
        init_weights: how `A` is drawn, as for `LoRA`.
    """

    by_update: ClassVar[bool] = True

    init_weights: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.d_in), init=how_drawn(self.init_weights, self.r)),
            "lora_B": ParamSpec((site.d_out, self.r)),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        update = base.weight * (p.lora_B @ p.lora_A)
        return y + F.linear(cast(self.drop(x, base), update), update)
