"""A kind of site: what is special about its product.

A site computes `y = P(x, W) + b` with a product `P` that is linear in a matrix `W (d_out, d_in)`. Kinds differ in `P`:
an embedding picks columns of `W`, a convolution applies `W` to patches, and each expert has a `W`. A variant is written
for a plain linear and sees no difference, because its `x` stands for the site's input: `F.linear(x, M)` computes
`P(x, M)` for any matrix `M (m, d_in)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SiteKind:
    """A kind of site: how it multiplies its input with its matrix. Each kind says how it differs from a plain linear.

    Args:
        transposed: whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does.
        rows: the rows of the stored weight that the site consists of, as the first and the one after the last. None
            means all.
    """

    transposed: bool = False
    rows: tuple[int, int] | None = None

    name: ClassVar[str]
    """As `Variant.target_kinds` has it."""
    article: ClassVar[str]
    """As errors call a site."""
    why: ClassVar[str] = ""
    """Why its input is not a tensor `(..., d_in)`, or its weight not a matrix."""
    has_roles: ClassVar[bool] = False
    """Whether its sites have roles in the model. Targets by role, and default targets, concern these alone."""
    vector_dims: ClassVar[int] = 0
    """How many of the last dimensions of the input are one vector of `d_in`; 0 if a variant gets no such tensor."""
    token_dim: ClassVar[int | None] = None
    """The dimension of `W (d_out, d_in)` that counts tokens, if it may be that of an embedding or a head."""
    is_stack: ClassVar[bool] = False
    """Whether the weight holds a matrix for each of several experts."""
    by_update_only: ClassVar[bool] = False
    """Whether its product is defined for updates of the size of `W` alone, and not for low-rank factors."""
    replaced_only: ClassVar[bool] = False
    """Whether a variant can replace its weight and bias, and do no more."""
    is_known_by_identity: ClassVar[bool] = False
    """Whether `identity` holds all inputs that there are, so that no other input has to be tried."""
    takes_bias: ClassVar[bool] = False
    """Whether its operator takes a bias as its third argument."""
    other_ranks: ClassVar[tuple[int, ...]] = ()
    """How many dimensions more than `example` an input may have, besides none."""
    value_type: ClassVar[type] = Tensor
    """The type of the object that a variant gets for the output."""

    def is_named_after(self, parameter: str) -> bool:
        """Tell whether a site is called like its weight, which has this name in its module, and not like the module."""
        return self.is_stack

    def input_channels(self, d_in: int) -> int:
        """Return how many channels the input has, for rows of `W` of this size."""
        return d_in

    # The weight as a matrix.

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the matrix `(d_out, d_in)` from the stored weight; of experts, `(experts, d_out, d_in)`."""
        part = stored if self.rows is None else stored[slice(*self.rows)]
        return part.mT if self.transposed else part

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return the weight to store for a matrix: the inverse of `matrix`. Rows of other sites come from `like`."""
        part = matrix.mT.contiguous() if self.transposed else matrix
        return part if self.rows is None else torch.cat([like[: self.rows[0]], part, like[self.rows[1] :]])

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        """Return the shape in which a matrix `(d_out, d_in)` is stored, if it is a whole parameter."""
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def bias(self, bias: Tensor) -> Tensor:
        """Return `bias (d_out,)` in the shape that meets the output of the operator."""
        return bias

    # The product in the model's own layout.

    def factor(self, stored: Tensor) -> Tensor:
        """Return the tensor that `multiply` takes: the weight in the layout of the operator."""
        return self.matrix(stored)

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        """Compute the product without a bias, by one operator. `routing` holds its other inputs."""
        return F.linear(x, factor)

    @property
    def routed(self) -> bool:
        """Tell whether `multiply` takes more than two tensors."""
        return False

    def example_routing(self, x: Tensor, experts: int) -> tuple[Tensor, ...]:
        """Return examples of the other inputs of the product, beside an input `x`, for so many experts."""
        return ()

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return an example input, for graphs without shapes, and which of its dimensions are fixed."""
        return stored.new_empty(2, 3, self.matrix(stored).shape[-1]), (2,)

    # The product as a variant sees it: the last dimension of input and output is the matrix's.

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> Any:
        """Return the object that a variant gets as `x`.

        Args:
            x: the input that the model passes.
            dtype: the dtype of the matrix.
            who: the words that name variant and site in errors.
            routing: the other inputs of the product.
        """
        return x

    def as_in_model(self, entered: Any) -> Tensor:
        """Return the input in the model's layout, from the object that a variant calls `base` with."""
        x: Tensor = entered if isinstance(entered, Tensor) else entered.value
        return x

    def operand(self, tensor: Tensor, who: str) -> Any:
        """Return the object that a variant gets for a tensor of its own."""
        return tensor

    def frozen_operand(self, matrix: Tensor, who: str) -> Any:
        """Return the object that a variant gets for the site's matrix."""
        return self.operand(matrix, who)

    def result(self, y: Tensor, x: Any) -> Any:
        """Return the object that a variant gets from `base(x)`, for a product `y` in the model's layout."""
        return y

    def leave(self, y: Any) -> Tensor:
        """Return the output in the model's layout, from the object that a variant returned."""
        output: Tensor = y
        return output

    def identity(self, matrix: Tensor) -> Any:
        """Return the input whose products with `matrix (d_out, d_in)`, or another such, are the columns of that."""
        return torch.diag_embed(torch.ones_like(matrix[0]))
