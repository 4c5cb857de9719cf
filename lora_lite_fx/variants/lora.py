"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..site import Site
from ..variant import FrozenLinear, ParamSpec, Variant, cast, is_finite, low_rank, register


@dataclass(frozen=True, kw_only=True)
class LowRank(Variant):
    """What LoRA, PiSSA and DoRA have in common: factors `A (r, d_in)` and `B (d_out, r)`, and the scale of `B A`.

    Args:
        dropout: probability of dropping an element of the branch's input, in training.
        rank_stabilized: scale by `alpha / sqrt(r)` instead of `alpha / r` (https://arxiv.org/abs/2312.03732).
    """

    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            is_finite(self.dropout) and 0 <= self.dropout < 1, f"dropout is a probability below 1, got {self.dropout!r}"
        )

    @property
    def scale(self) -> float:
        """The factor `s` of `B A`."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.d_in), init="kaiming"),
            "lora_B": ParamSpec((site.d_out, self.r)),
        }

    def branch(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        """`s B A drop(x)`."""
        if self.dropout:
            x = F.dropout(x, self.dropout, base.training)
        return self.scale * low_rank(x, p.lora_A, p.lora_B)


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """`y = W x + b + s B A drop(x)`, `s = alpha / r`; https://arxiv.org/abs/2106.09685, equation 3.

    Identity at the start, exactly: `B = 0`.
    """

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        return cast(y + self.branch(x, base, p), y)
