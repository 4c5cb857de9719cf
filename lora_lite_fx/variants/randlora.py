"""RandLoRA: full-rank parameter-efficient fine-tuning (Albert et al., 2025), https://arxiv.org/abs/2502.00987"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.calibration_data import Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.hyperparameters import WithScale
from ..adapters.maths import cast
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..errors import ConfigError
from ..graph.tensors import has_values
from ..sites.site import Site
from .vera import SharedProjections


@register
@dataclass(frozen=True, kw_only=True)
class RandLoRA(WithScale, SharedProjections):
    """`y = W x + b + s sum_j B_j L_j A G_j drop(x)`, `s = alpha / r`; https://arxiv.org/abs/2502.00987.

    `A (r, m)` and `B_j (M, r)` are random, frozen, and shared by all sites of the adapter. Each site reads as much of
    them as it needs. `L_j`, `G_j` are diagonal and trained. `m` and `M` are the smaller and the larger side of `W`;
    where `m` is `d_out`, the sum is transposed. There are `n = ceil(m / r)` terms: together they have full rank, the
    products are as large as `W`, and a *smaller* `r` trains *more*. PEFT's default is `r=32, alpha=640`.

    Identity at the start, exactly: `L = 0`.

    Args:
        basis: uniform (`dense`); or ternary, of which one in three (`sparse`), or `1 / sqrt(m)` (`very_sparse`), is not
            zero, stored dense all the same. Each is scaled to a standard deviation of one.
        shared_bases: the number of `B_j` that there are; 0 for the largest number of the sites.
    """

    takes_scale: ClassVar[tuple[str, ...]] = ("lora_lambda",)

    basis: Literal["dense", "sparse", "very_sparse"] = "dense"
    shared_bases: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.shared_bases >= 0, "shared_bases must be positive, or 0 for the largest of the sites")

    def finalize(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Self:
        finalized = super().finalize(sites, statistics)
        # As many as a site of both largest sides would need, whether or not there is one: PEFT's number.
        smaller = min(finalized.shared_d_in, finalized.shared_d_out)
        needed = max(math.ceil(smaller / self.for_site(site.name).r) for site in sites)
        return dataclasses.replace(finalized, shared_bases=self.shared_bases or needed)

    def check(self, site: Site) -> None:
        super().check(site)
        needed = self._count(site)
        self._require(
            self.shared_bases == 0 or needed <= self.shared_bases,
            f"shared_bases={self.shared_bases} is too small for site {site.name!r}, which needs {needed};"
            " use 0 for the largest",
        )

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        self.require_settled()
        n, m = self._count(site), min(site.d_in, site.d_out)
        smaller, larger = sorted((self.shared_d_in, self.shared_d_out))
        return {
            "lora_lambda": ParamSpec((self.r, n)),
            "lora_gamma": ParamSpec((n, m), init=1 / max(n, m)),
            "lora_shared_randlora_A": ParamSpec((self.shared_r, smaller), self.fill_A, trainable=False),
            "lora_shared_randlora_B": ParamSpec(
                (larger, self.shared_bases, self.shared_r), self.fill_B, trainable=False
            ),
        }

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        n, (m, larger) = self._count(base.site), sorted((base.site.d_in, base.site.d_out))
        a = p.lora_shared_randlora_A[: self.r, None, :m]
        a = (p.lora_lambda[:, :, None] * a * p.lora_gamma).flatten(0, 1)  # (r n, m)
        # The columns of the B_j meet these rows in PEFT's order, by column first: another numbering of random columns.
        b = p.lora_shared_randlora_B[:larger, :n, : self.r].flatten(1)  # (M, n r)
        down, up = (a, b) if m == base.site.d_in else (b.t(), a.t())
        return y + self.scale * F.linear(F.linear(cast(self.drop(x, base), a), down), up)

    def _count(self, site: Site) -> int:
        """Return the number of terms at `site`."""
        return math.ceil(min(site.d_in, site.d_out) / self.r)

    def projections(self) -> tuple[Tensor, Tensor]:
        m, larger = sorted((self.shared_d_in, self.shared_d_out))
        return _draw(self.basis, self.projection_seed, self.shared_r, m, larger, self.shared_bases)


def _draw(basis: str, seed: int, r: int, m: int, larger: int, count: int) -> tuple[Tensor, Tensor]:
    """Return `A (r, m)` and `B (larger, count, r)`, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    if basis == "dense":

        def draw(rows: int, columns: int) -> Tensor:
            # In bfloat16, as PEFT: in float32 the same seed would give other values.
            empty = torch.empty(rows, columns, dtype=torch.bfloat16, device="cpu")
            return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        a, b = draw(r, m), torch.stack([draw(larger, r) for _ in range(count)], dim=1)
    else:
        share = 1 / (2 * (3 if basis == "sparse" else math.sqrt(m)))  # of each sign
        shapes = (r, m), (larger, count, r)
        draws = [torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
        a, b = ((drawn > 1 - share).float() - (drawn < share).float() for drawn in draws)
    if has_values(a) and (a.min() == a.max() or b.min() == b.max()):
        raise ConfigError(f"RandLoRA: the bases drawn for r={r} and a side of {m} are all one number; use a larger r.")
    return a / a.std(), b / b.std()
