"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023), https://arxiv.org/abs/2310.11454"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.calibration_data import Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithDropout, WithRank
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..sites.site import Site


@dataclass(frozen=True, kw_only=True)
class SharedProjections(WithDropout, WithRank):
    """Base class of the variants with frozen random projections: one pair for all sites, cut to size at each.

    Args:
        projection_seed: seed of the projections. The same seed and sizes give the same values, PEFT's.
        shared_r, shared_d_in, shared_d_out: the rank and widths that the projections are made for; 0 for the largest
            of the sites.
    """

    projection_seed: int = 0
    shared_r: int = 0
    shared_d_in: int = 0
    shared_d_out: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            0 <= self.projection_seed < 2**64, f"projection_seed is a number from 0, got {self.projection_seed!r}"
        )
        for name in ("shared_r", "shared_d_in", "shared_d_out"):
            self._require(getattr(self, name) >= 0, f"{name} must be positive, or 0 for the largest of the sites")

    def finalize(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Self:
        return dataclasses.replace(
            self,
            shared_r=self.shared_r or max(self.for_site(site.name).r for site in sites),
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

    def require_settled(self) -> None:
        """Raise `ConfigError` if the sizes of the projections are not known yet."""
        sizes = {name: value for name, value in vars(self).items() if name.startswith("shared_")}
        self._require(0 not in sizes.values(), f"the projections have no sizes before rewrite settles them: {sizes}")

    def projections(self) -> tuple[Tensor, Tensor]:
        """Return the two projections, on the CPU; the same whatever the site."""
        raise NotImplementedError

    def fill_A(self, a: Tensor) -> None:
        """Write the first projection into `a`, in place."""
        a.copy_(self.projections()[0])

    def fill_B(self, b: Tensor) -> None:
        """Write the second projection into `b`, in place."""
        b.copy_(self.projections()[1])


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(SharedProjections):
    """`y = W x + b + lb * (B (ld * (A drop(x))))`; https://arxiv.org/abs/2310.11454, equation 2.

    `A` and `B` are random, frozen, and shared by all sites of the adapter; a site reads the first `d_in` columns of `A`
    and the first `d_out` rows of `B`. Trained are the vectors `ld (r,)` and `lb (d_out,)`, so that a rank costs little:
    the paper takes 256 to 1024. Identity at the start, exactly: `lb = 0`.

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
        self.require_settled()
        return {
            "lora_ld": ParamSpec((self.r,), init=self.d_initial),
            "lora_lb": ParamSpec((site.d_out,)),
            "lora_shared_vera_A": ParamSpec((self.shared_r, self.shared_d_in), self.fill_A, trainable=False),
            "lora_shared_vera_B": ParamSpec((self.shared_d_out, self.shared_r), self.fill_B, trainable=False),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        a = p.lora_shared_vera_A[: self.r, : base.site.d_in]
        b = p.lora_shared_vera_B[: base.site.d_out, : self.r]
        hidden = p.lora_ld * F.linear(cast(self.drop(x, base), a), a)
        # `lb` widens what autocast has narrowed, which a trace in single precision cannot know.
        result: Tensor = y + p.lora_lb * F.linear(hidden, b)
        return result.type_as(y)

    def projections(self) -> tuple[Tensor, Tensor]:
        return _draw(self.projection_seed, self.shared_r, self.shared_d_in, self.shared_d_out)


def _draw(seed: int, r: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Return `A (r, d_in)` and `B (d_out, r)`, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((r, d_in), (d_out, r)))
    for projection in (a, b):
        torch.nn.init.kaiming_uniform_(projection, generator=generator)
    return a, b
