"""LoHa: FedPara, Low-rank Hadamard Product (Nam et al., 2021), https://arxiv.org/abs/2108.06098"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank, WithScale, WithUpdateDropout
from ..adapters.maths import cast, from_core, low_rank
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class LoHa(WithUpdateDropout, WithScale, WithRank):
    """`y = W x + b + s (B1 A1 * B2 A2) x`, elementwise, `s = alpha / r`; https://arxiv.org/abs/2108.06098.

    The elementwise product of two matrices of rank r has rank up to r^2. Identity at the start, exactly: `A2 = 0`.

    Args:
        effective_conv: whether at a convolution a factor is of rank r in the channels alone: `A (r, channels)`,
            `B (r, d_out)`, and a core `T (r, r, *kernel)` between them (the paper's proposition 3).
    """

    by_update: ClassVar[bool] = True
    takes_scale: ClassVar[tuple[str, ...]] = ("lora_B1",)

    effective_conv: bool = False

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        random = partial(ParamSpec, init="kaiming")
        if has_core(self.effective_conv, site):
            core = random(core_shape(self.r, site))
            a, b, cores = (self.r, site.channels), (self.r, site.d_out), {"lora_T1": core, "lora_T2": core}
        else:
            a, b, cores = (self.r, site.d_in), (site.d_out, self.r), {}
        return {"lora_A1": random(a), "lora_B1": random(b), "lora_A2": ParamSpec(a), "lora_B2": random(b), **cores}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y, site = base(x), base.site
        plain = not has_core(self.effective_conv, site) and not site.kind.by_update_only
        if plain and self.r**2 * (site.d_in + site.d_out) < site.d_in * site.d_out:
            # The product is one of factors of rank r^2: all products of a row of A1 and one of A2, of columns of B.
            a = (p.lora_A1[:, None] * p.lora_A2).flatten(0, 1)
            b = (p.lora_B1[:, :, None] * p.lora_B2[:, None]).flatten(1)
            delta = low_rank(x, a, b)
        else:  # at such ranks the matrix itself is smaller
            if has_core(self.effective_conv, site):
                first, second = (
                    from_core(core, a, b)
                    for core, a, b in ((p.lora_T1, p.lora_A1, p.lora_B1), (p.lora_T2, p.lora_A2, p.lora_B2))
                )
            else:
                first, second = p.lora_B1 @ p.lora_A1, p.lora_B2 @ p.lora_A2
            weight = first * second
            delta = F.linear(cast(x, weight), weight)
        return y + self.scale * self.drop_update(delta, base)


def has_core(effective_conv: bool, site: Site) -> bool:
    """Return whether a factor at `site` has a core; a kernel of one element needs none."""
    return effective_conv and math.prod(site.kernel) > 1


def core_shape(r: int, site: Site) -> tuple[int, ...]:
    """Return the shape of a core: of a kernel with one dimension it has a second one, as in PEFT's files."""
    return (r, r, *site.kernel, *(1,) * (len(site.kernel) == 1))
