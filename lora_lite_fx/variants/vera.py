"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023), https://arxiv.org/abs/2310.11454"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import register
from ..site import Site
from ..variant import FrozenLinear, ParamSpec, Statistic, WithDropout, cast


@dataclass(frozen=True, kw_only=True)
class SharedProjections(WithDropout):
    """What the variants with frozen random projections have in common: one pair for all sites, cut to size at each.

    Args:
        projection_seed: what the projections are drawn from. The same seed and sizes give the same values, PEFT's.
        shared_r, shared_d_in, shared_d_out: the rank and widths that the projections are made for; 0 for the largest
            of the sites.
    """

    projection_seed: int = 0
    shared_r: int = 0
    shared_d_in: int = 0
    shared_d_out: int = 0

    bounded_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            0 <= self.projection_seed < 2**64, f"projection_seed is a number from 0, got {self.projection_seed!r}"
        )
        for name in ("shared_r", "shared_d_in", "shared_d_out"):
            self._require(getattr(self, name) >= 0, f"{name} must be positive, or 0 for the largest of the sites")

    def settle(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Self:
        return dataclasses.replace(
            self,
            shared_r=self.shared_r or max(self.at(site.name).r for site in sites),
            shared_d_in=self.shared_d_in or max(site.d_in for site in sites),
            shared_d_out=self.shared_d_out or max(site.d_out for site in sites),
        )

    def check(self, site: Site) -> None:
        super().check(site)
        for name, needed in (("shared_r", self.r), ("shared_d_in", site.d_in), ("shared_d_out", site.d_out)):
            size = getattr(self, name)
            self._require(
                size == 0 or needed <= size,
                f"{name}={size} is too small for site {site.name!r}, which needs {needed}; use 0 for the largest",
            )

    def generator(self) -> torch.Generator:
        """What the projections are drawn with, on the CPU whatever the device."""
        return torch.Generator().manual_seed(self.projection_seed)


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(SharedProjections):
    """`y = W x + b + lb * (B (ld * (A drop(x))))`; https://arxiv.org/abs/2310.11454, equation 2.

    `A` and `B` are random, frozen, and shared by all sites of the adapter; a site reads the first `d_in` columns of `A`
    and the first `d_out` rows of `B`. Trained are the vectors `ld (r,)` and `lb (d_out,)`, so that a rank costs little:
    the paper takes 256 to 1024. Identity at the start, exactly: `lb = 0`. `alpha` is not used.

    Args:
        d_initial: what `ld` starts at. Not zero, where every gradient would be zero.
    """

    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.d_initial != 0, "d_initial=0 would leave every gradient zero; use another number, such as 0.1"
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        return {
            "lora_ld": ParamSpec((self.r,), init=self.d_initial),
            "lora_lb": ParamSpec((site.d_out,)),
            "lora_shared_vera_A": ParamSpec((self.shared_r, self.shared_d_in), self._draw_A, trainable=False),
            "lora_shared_vera_B": ParamSpec((self.shared_d_out, self.shared_r), self._draw_B, trainable=False),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        a = p.lora_shared_vera_A[: self.r, : base.site.d_in]
        b = p.lora_shared_vera_B[: base.site.d_out, : self.r]
        hidden = p.lora_ld * F.linear(cast(self.drop(x, base), a), a)
        return cast(y + p.lora_lb * F.linear(hidden, b), y)

    def _draw_A(self, a: Tensor) -> None:
        a.copy_(self._draw()[0])

    def _draw_B(self, b: Tensor) -> None:
        b.copy_(self._draw()[1])

    def _draw(self) -> tuple[Tensor, Tensor]:
        """`A (shared_r, shared_d_in)` and `B (shared_d_out, shared_r)`, one after the other from one generator."""
        generator = self.generator()
        shapes = (self.shared_r, self.shared_d_in), (self.shared_d_out, self.shared_r)
        a, b = (
            torch.nn.init.kaiming_uniform_(torch.empty(s, dtype=torch.float32), generator=generator) for s in shapes
        )
        return a, b
