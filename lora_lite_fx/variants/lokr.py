"""LoKr: Low-rank Kronecker product (KronA, Edalati et al., 2022, https://arxiv.org/abs/2212.10650; LyCORIS, Yeh et al.,
2023, https://arxiv.org/abs/2309.14859)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
class LoKr(WithScale, WithRank):
    """`y = W x + b + s (W1 kron W2) x`, `s = alpha / r`; https://arxiv.org/abs/2309.14859.

    With `d_out = a c` and `d_in = b d`: `W1 (a, b)` mixes the blocks of `x`, `W2 (c, d)` is applied to each of them, in
    activation space. A factor is itself `B A` of rank r where r is less than half its larger side (`W1` only if
    `decompose_both`), so that `r` has no upper limit. Identity at the start, exactly: `W1 = 0` or `B1 = 0`.

    Args:
        decompose_both: whether `W1` may be of rank r too.
        decompose_factor: `a` and `b`; where it does not divide a width, the largest divisor below it and at most the
            root of the width. -1: the largest divisor at most the root.
    """

    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.decompose_factor == -1 or self.decompose_factor >= 1,
            f"decompose_factor must be positive, or -1 for the root of each width, got {self.decompose_factor}",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        (a, c), (b, d) = (_factors(width, self.decompose_factor) for width in (site.d_out, site.d_in))
        random = partial(ParamSpec, init="kaiming")
        if self.decompose_both and self.r < max(a, b) / 2:
            w1 = {"lora_A1": random((self.r, b)), "lora_B1": ParamSpec((a, self.r))}
        else:
            w1 = {"lora_W1": ParamSpec((a, b))}
        if self.r < max(c, d) / 2:
            w2 = {"lora_A2": random((self.r, d)), "lora_B2": random((c, self.r))}
        else:
            w2 = {"lora_W2": random((c, d))}
        return {**w1, **w2}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        names = self.params(base.site)
        w1 = p.lora_W1 if "lora_W1" in names else p.lora_B1 @ p.lora_A1
        blocks = x.unflatten(-1, (w1.shape[1], -1))
        if "lora_W2" in names:
            blocks = F.linear(cast(blocks, p.lora_W2), p.lora_W2)
        else:
            blocks = low_rank(blocks, p.lora_A2, p.lora_B2)
        # The small factor takes the scale, so that nothing of the size of y is computed twice.
        mixed = F.linear(blocks.mT, self.alpha / self.r * w1).mT
        return y + mixed.flatten(-2)


def _factors(width: int, wanted: int) -> tuple[int, int]:
    """Return two factors of `width`, see `decompose_factor`."""
    if wanted > 0 and width % wanted == 0:
        return wanted, width // wanted
    limit = math.isqrt(width) if wanted == -1 else min(wanted, math.isqrt(width))
    first = max(divisor for divisor in range(1, limit + 1) if width % divisor == 0)
    return first, width // first
