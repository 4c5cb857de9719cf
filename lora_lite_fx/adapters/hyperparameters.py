"""The hyper-parameters that several variants have: a rank, a scale, dropout. A variant derives from those it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sites.site import Site
from .frozen_linear import FrozenLinear
from .param_spec import is_finite
from .patterns import first_occurring
from .variant import Variant


@dataclass(frozen=True, kw_only=True)
class WithRank(Variant):
    """Base class of the variants with a rank.

    Args:
        r: rank. It may exceed a side of the weight, as at a classifier's head, unless the variant says otherwise.
        rank_pattern: other ranks by name: a mapping (or pairs) of regular expressions, searched in the qualified name,
            to ranks. The first that matches a site counts.
    """

    r: int = 8
    rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()

    def __post_init__(self) -> None:
        self._require(is_count(self.r), f"r must be a positive integer, got {self.r!r}")
        super().__post_init__()
        self._make_pairs("rank_pattern", is_count, "positive integers")

    def overrides(self, name: str) -> dict[str, Any]:
        return super().overrides(name) | override(self, "r", "rank_pattern", name)

    def require_rank_at_most(self, limit: int, site: Site) -> None:
        """Raise `ConfigError` if `r` exceeds `limit` at a site where there are no more directions than that."""
        self._require(
            self.r <= limit,
            f"r={self.r} is larger than site {site.name!r} allows ({site.d_out} x {site.d_in}); use r <= {limit}",
        )


@dataclass(frozen=True, kw_only=True)
class WithScale(Variant):
    """Base class of the variants whose update is scaled by a constant.

    Args:
        alpha: scale numerator; the update is multiplied by `alpha / r`, or as the variant's formula says.
        alpha_pattern: other alphas by name: a mapping (or pairs) of regular expressions, searched in the qualified
            name, to alphas. The first that matches a site counts.
    """

    takes_scale: ClassVar[tuple[str, ...]] = ()
    """The tensors to multiply by the scale, so that a scale of one computes the same. Without any, no file folds it."""

    alpha: float = 16.0
    alpha_pattern: Mapping[str, float] | Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make_pairs("alpha_pattern", is_finite, "finite numbers")

    @property
    def scale(self) -> float:
        """Return the factor `s` of the update, which is proportional to `alpha`."""
        return self.alpha / getattr(self, "r", 1)

    def overrides(self, name: str) -> dict[str, Any]:
        return super().overrides(name) | override(self, "alpha", "alpha_pattern", name)


@dataclass(frozen=True, kw_only=True)
class WithDropout(Variant):
    """Base class of the variants that drop elements of their input.

    Args:
        dropout: probability of dropping an element of the adapter's input, in training.
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.dropout < 1, f"dropout is a probability below 1, got {self.dropout!r}")

    def drop(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return `x` with elements dropped if the model is in training."""
        return F.dropout(x, self.dropout, base.training) if self.dropout else x


@dataclass(frozen=True, kw_only=True)
class WithUpdateDropout(Variant):
    """Base class of the variants that drop rows of their update, or all of it at once, in training.

    Args:
        rank_dropout: probability of dropping an output of the update.
        rank_dropout_scale: whether the other outputs are scaled up to the same mean then.
        module_dropout: probability of leaving the whole adapter out of a call.
    """

    rank_dropout: float = 0.0
    rank_dropout_scale: bool = True
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_dropout", "module_dropout"):
            value = getattr(self, name)
            self._require(0 <= value < 1, f"{name} is a probability below 1, got {value!r}")

    def drop_update(self, update: Tensor, base: FrozenLinear) -> Tensor:
        """Return `update (..., d_out)` with what is dropped at zero, if the model is in training."""
        if self.rank_dropout:
            kept = which_kept(update.new_ones(base.site.d_out), self.rank_dropout, base)
            if self.rank_dropout_scale:
                kept = kept / kept.mean().clamp_min(torch.finfo(kept.dtype).tiny)
            update = update * kept
        return update * which_kept(update.new_ones(()), self.module_dropout, base) if self.module_dropout else update


def which_kept(ones: Tensor, probability: float, base: FrozenLinear) -> Tensor:
    """Return `ones` with some at zero in training. Dropout follows the mode, and would scale up what it keeps."""
    return F.dropout(ones, probability, base.training).clamp_max(1)


def override(variant: Variant, field: str, pattern: str, name: str) -> dict[str, Any]:
    """Return the override of `field` at the site called `name`, see `Variant.overrides`.

    Args:
        variant: the config.
        field: a field.
        pattern: the field that has its other values by name.
        name: of a site.
    """
    values = getattr(variant, pattern)
    index = first_occurring([expression for expression, _ in values], name)
    if index is None or values[index][1] == getattr(variant, field):
        return {}
    return {field: values[index][1], pattern: ()}


def is_count(value: object) -> bool:
    """Return whether `value` is a positive integer. For checking the fields of variants."""
    return type(value) is int and value >= 1
