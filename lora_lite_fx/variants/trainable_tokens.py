"""Trainable tokens: train some rows of an embedding, https://huggingface.co/docs/peft/package_reference/trainable_tokens"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.calibration_data import Statistic
from ..adapters.frozen_linear import FrozenLinear
from ..adapters.param_spec import ParamSpec
from ..adapters.registry import register
from ..adapters.variant import Variant, as_tuple
from ..sites.kinds.embedding import Lookup
from ..sites.site import Site


@register
@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Variant):
    """`y = W'[ids]`, where the rows `token_indices` of `W'` start as copies of those of the frozen `W (ids, width)`.

    Identity at the start, exactly. For a few new tokens, such as those that mark the turns of a chat, in place of
    `Full` on the whole embedding. A head that is tied to the embedding has the same rows, and trains them too. The rows
    are stored as they are, so that they are right also on a base whose new rows are drawn anew.

    Args:
        token_indices: the ids to train.
    """

    token_indices: int | Sequence[int] = ()
    target_kinds: str | Sequence[str] = ("embedding",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make_tuple("token_indices")
        ids = as_tuple(self.token_indices)
        self._require(
            bool(ids) and all(type(token) is int and token >= 0 for token in ids),
            f"token_indices must name at least one id, all from 0, got {self.token_indices!r}",
        )
        self._require(len(set(ids)) == len(ids), f"token_indices names an id twice: {self.token_indices!r}")

    def selects(self, site: Site) -> bool:
        if super().selects(site):
            return True
        tied = (replace(site, name=name, kind=Lookup(), tied=()) for name in site.tied)
        return site.kind.has_roles and any(map(super().selects, tied))

    def check(self, site: Site) -> None:
        super().check(site)
        self._require(
            site.kind.token_dim is not None and site.kind.rows is None,
            f"{site.name!r} is {site.kind.article}, and its weight has no rows for tokens",
        )
        rows, largest = self._sizes(site)[0], max(as_tuple(self.token_indices))
        self._require(
            largest < rows,
            f"token {largest} is out of range at {site.name!r}, which has {rows} rows. Name the embedding to target",
        )

    def finalize(self, sites: Sequence[Site], statistics: Mapping[str, Statistic]) -> Variant:
        apart = [site.name for site in sites if site.name not in (sites[0].name, *sites[0].tied)]
        self._require(
            not apart,
            f"{sites[0].name!r} and {', '.join(map(repr, apart))} have weights of their own, and the rows of one are"
            " trained. Name it in target_names; a list of configs trains several",
        )
        return self

    def params(self, site: Site) -> Mapping[str, ParamSpec]:
        ids = torch.tensor(as_tuple(self.token_indices))
        return {
            "lora_shared_tokens": ParamSpec((len(ids), self._sizes(site)[1])),
            "lora_shared_ids": ParamSpec((len(ids),), init=lambda t: t.copy_(ids), trainable=False, dtype=torch.int64),
        }

    def init_shared(self, site: Site, weight: Tensor, p: Any) -> None:
        dim = self._dim(site)
        rows = weight.index_select(dim, p.lora_shared_ids)
        p.lora_shared_tokens.copy_(rows.t() if dim else rows)

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        dim = self._dim(base.site)
        rows = p.lora_shared_tokens.type_as(base.weight)
        return base(x, weight=base.weight.index_copy(dim, p.lora_shared_ids, rows.t() if dim else rows))

    def _dim(self, site: Site) -> int:
        """Return the dimension of `W (d_out, d_in)` that tokens are along."""
        return site.kind.token_dim or 0

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Return the number of rows and their width."""
        return (site.d_in, site.d_out) if self._dim(site) else (site.d_out, site.d_in)
