"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al., 2024), https://arxiv.org/abs/2406.13175"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithRank
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class SHiRA(WithRank):
    """`y = (W + S) x + b`, `S` sparse at fixed random places; https://arxiv.org/abs/2406.13175.

    There are `r (d_in + d_out)` trained entries, as many as a LoRA of rank r has, or all of a smaller weight. `S` is
    formed as a matrix. Identity at the start, exactly: `S = 0`.

    Args:
        seed: of the places, which are the same at sites of the same size.
    """

    by_update: ClassVar[bool] = True

    r: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.seed < 2**64, f"seed is a number from 0, got {self.seed!r}")

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        size = site.d_in * site.d_out
        count = min(self.r * (site.d_in + site.d_out), size)

        def draw(places: Tensor) -> None:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(size, generator=generator, device="cpu")[:count].sort().values
            places.copy_(torch.stack([drawn // site.d_in, drawn % site.d_in]))

        return {
            "lora_S": ParamSpec((count,)),
            # The row and the column of each entry.
            "lora_places": ParamSpec((2, count), draw, trainable=False, dtype=torch.int64),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        d_in, d_out = base.site.d_in, base.site.d_out
        flat = p.lora_places[0] * d_in + p.lora_places[1]
        update = p.lora_S.new_zeros(d_out * d_in).scatter_add(0, flat, p.lora_S).unflatten(0, (d_out, d_in))
        return y + F.linear(cast(x, update), update)
