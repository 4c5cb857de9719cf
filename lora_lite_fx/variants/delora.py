"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al., 2025), https://arxiv.org/abs/2503.18225"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import cast, wide
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site

_SMALLEST_NORM = 1e-4


@register
@dataclass(frozen=True, kw_only=True)
class DeLoRA(WithDropout, WithRank):
    """`y = W x + b + B diag(lambda / (r ||a_i|| ||b_i||)) A (w * drop(x))`; https://arxiv.org/abs/2503.18225.

    This is equation 8; `a_i` are the rows of `A`, `b_i` the columns of `B`, `w (d_in,)` the norms of the columns of
    `W`. Identity at the start, exactly: `B = 0`. There is no `alpha`: `lambda`, which is trained, is the strength.

    Args:
        lambda0: what `lambda` starts at. Not zero, where every gradient would be zero.
    """

    lambda0: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.lambda0 != 0, "lambda0=0 would leave every gradient zero; use another number, such as 15")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.d_in), init="kaiming"),
            "lora_B": ParamSpec((site.d_out, self.r)),
            "lora_lambda": ParamSpec((), init=self.lambda0),
            "lora_wnorm": ParamSpec((site.d_in,), trainable=False),
        }

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        p.lora_wnorm.copy_(weight.norm(dim=0))

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        a_norms = wide(p.lora_A).norm(dim=1).clamp_min(_SMALLEST_NORM)
        b_norms = wide(p.lora_B).norm(dim=0).clamp_min(_SMALLEST_NORM)
        strength = cast(p.lora_lambda / (self.r * a_norms * b_norms), p.lora_A)
        # The small factor takes both scalings, so that nothing of the size of x is computed twice.
        a = strength[:, None] * p.lora_A * p.lora_wnorm
        return y + F.linear(F.linear(cast(self.drop(x, base), a), a), p.lora_B)
