"""EVA: One Initialization to Rule them All: Explained Variance Adaptation (Paischer et al., 2024), https://arxiv.org/abs/2410.07170"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.calibration_data import Batch, Observe, Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.registry import register
from ..adapters.variant import Variant
from ..sites.site import Site
from .lora import LowRank


@register
@dataclass(frozen=True, kw_only=True)
class EVA(LowRank):
    """`y = W x + b + s B A drop(x)`, `A` from the data; https://arxiv.org/abs/2410.07170, section 3.

    The rows of `A`, at most `d_in`, start as the top-r right singular vectors of the site's inputs on calibration data.
    The inputs' second moment `X^T X` is accumulated: its eigenvectors are those vectors, whatever the batches.
    Identity at the start, exactly: `B = 0`.

    Args:
        rho: 1 gives each site the rank it is configured with. Above, the ranks are redistributed: the components of
            all sites (at most `rho` times its rank for each) compete for the sum of the ranks by the share of the
            variance that they explain at their site. A site that wins none is left alone; alpha follows the rank.
        center: whether to take the mean off the inputs first (principal components, as PEFT does).
        use_label_mask: whether tokens whose label is -100 do not count, in batches that have labels (as PEFT does).
    """

    rho: float = 1.0
    center: bool = False
    use_label_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.rho >= 1, f"rho must be at least 1, got {self.rho!r}")

    def check(self, site: Site) -> None:
        super().check(site)
        self.require_rank_at_most(site.d_in, site)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y = base(x)
        return y + self.branch(x, base, p)

    def observer(self, site: Site, weight: Tensor) -> Observe:
        return _moment_of_labelled if self.use_label_mask else _second_moment

    def finalize(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Variant:
        if self.rho == 1 or not statistics:
            return self
        ranks = {site.name: self.for_site(site.name).r for site in sites}
        shares = {name: self._directions(statistics[name])[0] for name in ranks}
        limits = {site.name: min(round(ranks[site.name] * self.rho), site.d_in) for site in sites}
        competing = sorted(
            ((share, name) for name in ranks for share in shares[name][: limits[name]].tolist()), reverse=True
        )
        winners = [name for _, name in competing[: sum(ranks.values())]]
        won = {name: winners.count(name) for name in ranks}
        alphas = {name: self._alpha_for(name, rank) for name, rank in won.items() if rank}
        return replace(
            self,
            rank_pattern=tuple((_exactly(name), rank) for name, rank in won.items() if rank),
            alpha_pattern=tuple((_exactly(name), alpha) for name, alpha in alphas.items()),
            exclude_names=(*self.exclude_names, *(_exactly(name) for name, rank in won.items() if not rank)),
        )

    def _alpha_for(self, name: str, rank: int) -> float:
        """Return the alpha that keeps the site's scale at another rank."""
        before = self.for_site(name)
        ratio = rank / before.r
        return before.alpha * (ratio**0.5 if self.rank_stabilized else ratio)

    def init(self, site: Site, weight: Tensor, p: Any) -> None:
        self._require(False, "it starts from data: give calibration=batches to rewrite, wrap or adapt")

    def calibrate(self, site: Site, weight: Tensor, p: Any, statistic: Statistic) -> None:
        tokens = int(statistic.total[-1, -1])
        self._require(
            tokens >= self.r,
            f"site {site.name!r} saw {tokens} tokens of calibration data; r={self.r} needs as many at least",
        )
        p.lora_A.copy_(self._directions(statistic)[1][: self.r])

    def _directions(self, statistic: Statistic) -> tuple[Tensor, Tensor]:
        """Return the share of variance that each direction explains, `(d_in,)`, and the directions, `(d_in, d_in)`."""
        moment, total = statistic.total[:-1, :-1], statistic.total[-1, :-1]
        if self.center:
            moment = moment - torch.outer(total, total) / statistic.total[-1, -1]
        values, vectors = torch.linalg.eigh(moment)
        values = values.flip(0).clamp_min(0)
        return values / values.sum(), vectors.flip(1).t()


def _second_moment(x: Tensor) -> Tensor:
    """Return `[X 1]^T [X 1]`: the second moment, with the sum of the inputs and their number in its last row."""
    x = F.pad(x, (0, 1), value=1.0)
    return x.t() @ x


def _moment_of_labelled(x: Tensor, batch: Batch) -> Tensor:
    """Return the second moment of the inputs whose label is not -100; of all, if there is not one label for each."""
    labels, inputs = batch.arguments.get("labels"), batch.inputs.flatten(0, -2)
    if not isinstance(labels, Tensor) or labels.numel() != len(inputs):
        return _second_moment(x)
    counts = labels.flatten() != -100
    if batch.mask is not None:
        counts &= batch.mask.flatten().bool()
    return _second_moment(inputs[counts])


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
