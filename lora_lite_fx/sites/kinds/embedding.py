"""Embeddings as sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...graph.tensors import is_quantized
from ..matching import Call, Dialect, FrozenReader, Match, arguments_of
from .site_input import SiteInput
from .site_kind import SiteKind


@dataclass(frozen=True)
class Lookup(SiteKind):
    """An embedding. `W` is stored as `(d_in, d_out)`, one row for each of `d_in` ids.

    Its input counts as one-hot rows, which are never formed. To drop the one of a row is to drop the id.

    Args:
        padding: the id whose row gets no gradient, or -1.
    """

    padding: int = -1

    name: ClassVar[str] = "embedding"
    article: ClassVar[str] = "an embedding"
    why: ClassVar[str] = "the input of an embedding is ids"
    token_dim: ClassVar[int | None] = 1
    other_ranks: ClassVar[tuple[int, ...]] = (-1, 1)
    is_known_by_identity: ClassVar[bool] = True

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t().contiguous()

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return d_in, d_out

    def factor(self, stored: Tensor) -> Tensor:
        return stored

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        return F.embedding(x, factor, self.padding if self.padding >= 0 else None)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return torch.zeros(2, 3, dtype=torch.long, device=stored.device), ()

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, dtype, who)

    def result(self, y: Tensor, x: Any) -> Tensor:
        return y if x.kept is None else x.kept[..., None] * y

    def identity(self, matrix: Tensor) -> SiteInput:
        ids = torch.ones_like(matrix[0], dtype=torch.int64).cumsum(0) - 1
        return SiteInput(self, ids, matrix.dtype, "")

    def cast(self, x: SiteInput, dtype: torch.dtype) -> SiteInput:
        """Return the same ids in another dtype; a one is exact in any."""
        kept = None if x.kept is None else x.kept.to(dtype)
        return SiteInput(self, x.value, dtype, x.who, kept)

    def dropout(self, x: SiteInput, p: float = 0.5, training: bool = True, inplace: bool = False) -> SiteInput:
        """Return the ids with a factor for each: zero for a dropped one, and the scale of dropout for the others."""
        ones = torch.ones_like(x.value, dtype=x.dtype) if x.kept is None else x.kept
        return SiteInput(self, x.value, x.dtype, x.who, F.dropout(ones, p, training))

    def linear(self, x: SiteInput, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x M^T + bias`: rows of `M^T`."""
        y = self.result(self.multiply(x.value, matrix.t()), x)
        return y if bias is None else y + bias


def _embedding(reader: FrozenReader, node: fx.Node) -> Match | None:
    args = arguments_of(node)
    weight = reader.parameter(args["weight"], dim=2)
    if weight is None or weight.flipped or weight.rows or is_quantized(reader.gm.get_parameter(weight.name)):
        return None
    return Match(Call(args["indices"], node, node), weight, Lookup(padding=args["padding_idx"]))


EMBEDDING = Dialect((torch.ops.aten.embedding.default,), _embedding, (Lookup,))
