"""LoKr: Low-rank Kronecker product (KronA, Edalati et al., 2022, https://arxiv.org/abs/2212.10650; LyCORIS, Yeh et al.,
2023, https://arxiv.org/abs/2309.14859)"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank, WithScale, WithUpdateDropout
from ..adapters.maths import cast, from_core, kron, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site
from .loha import core_shape, has_core


@register
@dataclass(frozen=True, kw_only=True)
class LoKr(WithUpdateDropout, WithScale, WithRank):
    """`y = W x + b + s (W1 kron W2) x`, `s = alpha / r`; https://arxiv.org/abs/2309.14859.

    With `d_out = a c` and `d_in = b d`: `W1 (a, b)` mixes the blocks of `x`, `W2 (c, d)` is applied to each of them, in
    activation space. At a convolution `b d` are the channels, and `W2` has the kernel too. A factor is itself `B A` of
    rank r where r is less than half its larger side (`W1` only if `decompose_both`), so that `r` has no upper limit.
    Identity at the start, exactly: `W1 = 0` or `B1 = 0`.

    Args:
        effective_conv: whether at a convolution a `W2` of rank r is so in the channels alone, as for `LoHa`.
        decompose_both: whether `W1` may be of rank r too.
        decompose_factor: `a` and `b`; where it does not divide a width, the largest divisor below it and at most the
            root of the width. -1: the largest divisor at most the root.
    """

    by_update: ClassVar[bool] = True
    takes_scale: ClassVar[tuple[str, ...]] = ("lora_W1", "lora_B1")  # a site has one of them

    decompose_both: bool = False
    decompose_factor: int = -1
    effective_conv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.decompose_factor == -1 or self.decompose_factor >= 1,
            f"decompose_factor must be positive, or -1 for the root of each width, got {self.decompose_factor}",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        (a, c), (b, d) = (_factors(width, self.decompose_factor) for width in (site.d_out, site.channels))
        taps = math.prod(site.kernel)
        random = partial(ParamSpec, init="kaiming")
        if self.decompose_both and self.r < max(a, b) / 2:
            w1 = {"lora_A1": random((self.r, b)), "lora_B1": ParamSpec((a, self.r))}
        else:
            w1 = {"lora_W1": ParamSpec((a, b))}
        if self.r < max(c, d) / 2:
            if has_core(self.effective_conv, site):
                a2, b2, core = (self.r, d), (self.r, c), {"lora_T2": random(core_shape(self.r, site))}
            else:
                a2, b2, core = (self.r, d * taps), (c, self.r), {}
            w2 = {"lora_A2": random(a2), "lora_B2": random(b2), **core}
        else:
            w2 = {"lora_W2": random((c, d * taps))}
        return {**w1, **w2}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        names = self.params(base.site)
        w1 = p.lora_W1 if "lora_W1" in names else p.lora_B1 @ p.lora_A1
        if base.site.kernel:
            return y + self.drop_update(self._convolved(x, base.site, w1, p, names), base)
        blocks = x.unflatten(-1, (w1.shape[1], -1))
        if "lora_W2" in names:
            blocks = F.linear(cast(blocks, p.lora_W2), p.lora_W2)
        else:
            blocks = low_rank(blocks, p.lora_A2, p.lora_B2)
        # The small factor takes the scale, so that nothing of the size of y is computed twice.
        mixed = F.linear(blocks.mT, self.scale * w1).mT
        return y + self.drop_update(mixed.flatten(-2), base)

    def _convolved(self, x: Tensor, site: Site, w1: Tensor, p: Any, names: Iterable[str]) -> Tensor:
        """Return the update of a convolution, whose input has no blocks to mix: the matrix is formed."""
        if "lora_T2" in names:
            w2 = from_core(p.lora_T2, p.lora_A2, p.lora_B2)
        else:
            w2 = p.lora_W2 if "lora_W2" in names else p.lora_B2 @ p.lora_A2
        if len(site.kernel) == 1 and "lora_W2" in names:
            # PEFT puts the factors of such a convolution together in another order, without a meaning.
            w2 = w2.unflatten(1, (-1, *site.kernel))
            weight = torch.einsum("ab,cdk->cadbk", w1, w2).reshape(site.d_out, site.d_in)
        else:
            weight = kron(w1, w2)
        weight = self.scale * weight
        return F.linear(cast(x, weight), weight)


def _factors(width: int, wanted: int) -> tuple[int, int]:
    """Return two factors of `width`, see `decompose_factor`."""
    if wanted > 0 and width % wanted == 0:
        return wanted, width // wanted
    limit = math.isqrt(width) if wanted == -1 else min(wanted, math.isqrt(width))
    first = max(divisor for divisor in range(1, limit + 1) if width % divisor == 0)
    return first, width // first
