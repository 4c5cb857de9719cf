"""Products: the kinds of sites.

A site computes `y = P(x, W) + b`, a product that is linear in a matrix `W (d_out, d_in)`. Kinds differ in what `P` is:
an embedding picks columns of `W`, a convolution applies it to patches, experts have a `W` each. A variant is written
for a plain linear and sees no difference: what it gets as `x` stands for the site's input, and `F.linear(x, M)` is
`P(x, M)` for any matrix `M (m, d_in)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("linear", "embedding", "conv", "experts")
"""The kinds of sites, as `Variant.target_kinds` names them."""


@dataclass(frozen=True)
class SiteKind:
    """What a site does with its input and its matrix. This class is the plain linear; the others derive from it.

    Args:
        transposed: whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does.
        rows: of the stored weight, where the site is a part of it: the first and the one after the last; None for all.
    """

    transposed: bool = False
    rows: tuple[int, int] | None = None

    name: ClassVar[str] = "linear"
    article: ClassVar[str] = "a linear"

    # The weight as a matrix.

    def matrix(self, stored: Tensor) -> Tensor:
        """The weight as the model stores it, as `(d_out, d_in)`; of experts, as `(experts, d_out, d_in)`."""
        part = stored if self.rows is None else stored[slice(*self.rows)]
        return part.mT if self.transposed else part

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`; rows of other sites are those of `like`."""
        part = matrix.mT.contiguous() if self.transposed else matrix
        return part if self.rows is None else torch.cat([like[: self.rows[0]], part, like[self.rows[1] :]])

    # The product in the model's own layout.

    def factor(self, stored: Tensor) -> Tensor:
        """The tensor that `multiply` takes: the weight in the layout of the operator."""
        return self.matrix(stored)

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        """The product without a bias, as one operator; `routing` is what else it takes."""
        return F.linear(x, factor)

    @property
    def routed(self) -> bool:
        """Whether `multiply` takes more than two tensors."""
        return False

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """An input, for graphs that know no shapes, and which of its dimensions are fixed."""
        return stored.new_empty(2, 3, self.matrix(stored).shape[-1]), (2,)

    # The product as a variant sees it: the last dimension of input and output is the matrix's.

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Any:
        """What a variant gets as `x`. `dtype` is that of the matrix; `who` names variant and site in errors."""
        return x

    def result(self, y: Tensor, x: Any) -> Any:
        """`y`, in the model's layout, as a variant gets it from `base(x)`."""
        return y

    def leave(self, y: Any) -> Tensor:
        """What a variant returns, in the model's layout."""
        return y

    def identity(self, d_in: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The input whose products with `M` are the columns of `M`, one for each of its `d_in` entries."""
        return torch.eye(d_in, dtype=dtype, device=device)
