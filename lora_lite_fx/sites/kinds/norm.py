"""The factors of norms as sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from .linear import SiteKind
from .site_input import SiteInput


@dataclass(frozen=True)
class Norm(SiteKind):
    """A norm: `y = n(x) * w + b`. It counts as a linear with `W (channels, 1)`, whose input is never formed.

    A variant can call it with another weight and bias, and no more. That leaves the nodes of the norm as they are,
    whatever they compute. So `multiply` is a stand-in, which no graph has.
    """

    name: ClassVar[str] = "norm"
    article: ClassVar[str] = "a norm"
    other_ranks: ClassVar[tuple[int, ...]] = ()
    why: ClassVar[str] = "a norm has no matrix; only a variant that replaces its weight and bias, as Full does, fits"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1, 1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return (d_out,)

    def factor(self, stored: Tensor) -> Tensor:
        return stored.sum()

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return x * factor

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return stored.new_empty(2, 3, stored.numel()), (2,)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, x.dtype, who)

    def _refuse(self, x: SiteInput, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{x.who}, which is {self.article}: {self.why}.")

    cast = dropout = linear = _refuse
