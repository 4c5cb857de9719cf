"""RoAd: 3-in-1, 2D Rotary Adaptation for Efficient Finetuning, Batching and Composability (Liao et al., 2024), https://arxiv.org/abs/2409.00119"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapters.frozen_linear import FrozenLinear
from ..adapters.maths import wide
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..ops.rotated_pairs import rotated_pairs
from ..sites.site import Site

_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


@register
@dataclass(frozen=True, kw_only=True)
class RoAd(Variant):
    """`y = R (W x + b)`, R made of 2 x 2 rotations with a scale; https://arxiv.org/abs/2409.00119.

    In groups of `group_size`, element j of the first half is paired with element j of the second. A pair becomes
    `(a1 cos t1) u - (a2 sin t2) v`, `(a3 sin t3) u + (a4 cos t4) v`. Identity at the start, exactly: angles `t = 0`,
    scales `a = 1`.

    Args:
        kind: how many angles and scales a pair has. `road_1`: one of each, a rotation. `road_2`: one for each of
            `u'` and `v'`. `road_4`: all four; those of its cosines stay at zero, where a cosine has no slope.
        group_size: which elements are paired; even, and a divisor of `d_out`. Matters to speed and to files only.
    """

    kind: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.group_size > 0 and self.group_size % 2 == 0,
            f"group_size={self.group_size} must be even and positive: a group's halves are paired",
        )

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            site.d_out % self.group_size == 0,
            f"group_size={self.group_size} does not divide the {site.d_out} outputs of site {site.name!r}; "
            f"use an even number that does",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        shape = (site.d_out // 2 * _PER_PAIR[self.kind],)
        return {"lora_road_theta": ParamSpec(shape), "lora_road_alpha": ParamSpec(shape, init="ones")}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        half = self.group_size // 2
        # (groups, 1, 2 or 4, half): per pair; one row for each half; or two rows of cosines, then two of sines.
        grouped = (-1, _PER_PAIR[self.kind], half)
        theta, scale = wide(p.lora_road_theta).unflatten(0, grouped), p.lora_road_alpha.unflatten(0, grouped)
        cosines, sines = (slice(2), slice(2, None)) if self.kind == "road_4" else (slice(None), slice(None))
        straight = scale[:, cosines] * theta[:, cosines].cos()
        crossed = scale[:, sines] * theta[:, sines].sin()
        # The first of a pair takes the second negatively. Negate the sines: that is cheaper than negating outputs.
        signed = torch.cat((-crossed[:, :1], crossed[:, -1:]), 1)
        return rotated_pairs(y.unflatten(-1, (-1, 2, half)), straight, signed).flatten(-3).type_as(y)
