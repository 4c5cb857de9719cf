"""Tensor functions that several variants share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.tensors import HALF
from .frozen_linear import FrozenLinear


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it is in half precision, else unchanged. For norms and factorizations."""
    return tensor.float() if tensor.dtype in HALF else tensor


def cast(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` in the dtype of `like`. If the dtypes agree, the graph gets no node."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def identity_like(square: Tensor) -> Tensor:
    """Return the identity in the shape, dtype and device of `square (..., n, n)`, also after the graph was moved."""
    return torch.diag_embed(torch.ones_like(square.diagonal(dim1=-2, dim2=-1)))


def through(turn: Callable[[Tensor], Tensor], x: Any, base: FrozenLinear) -> Tensor:
    """Return `base(turn(x))` for a linear `turn` of the last dimension.

    The input of a convolution has none, so there the weight is turned, and what that adds is computed as an update.
    """
    if not base.site.kernel:
        return base.call(turn(x))
    unit = torch.ones_like(base.weight[0])
    update = F.linear(base.weight, turn(torch.diag_embed(unit))) - base.weight
    return base.call(x) + F.linear(cast(x, update), update)


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices."""
    product: Tensor = (first[:, None, :, None] * second[None, :, None, :]).flatten(2).flatten(0, 1)
    return product


def from_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix `(d_out, channels * kernel)` of a convolution with a low rank in its channels alone.

    Args:
        core: a convolution of r channels to r, `(r, r, *kernel)`.
        a: `(r, channels)`, for its second dimension.
        b: `(r, d_out)`, for its first.
    """
    weight: Tensor = torch.einsum("ijk,jc,io->ock", core.flatten(2), a, b)
    return weight.flatten(1)


def low_rank(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `B A x + bias (..., d_out)` for `x (..., d_in)`, `A (r, d_in)`, `B (d_out, r)`, without forming `B A`."""
    return F.linear(F.linear(cast(x, a), a), b, bias)
