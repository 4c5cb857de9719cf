"""Tensor functions that several variants share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.tensors import HALF


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it is in half precision, else unchanged. For norms and factorizations."""
    return tensor.float() if tensor.dtype in HALF else tensor


def cast(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` in the dtype of `like`. If the dtypes agree, the graph gets no node."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def identity_like(square: Tensor) -> Tensor:
    """Return the identity in the shape, dtype and device of `square (..., n, n)`, also after the graph was moved."""
    return torch.diag_embed(torch.ones_like(square.diagonal(dim1=-2, dim2=-1)))


def low_rank(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `B A x + bias (..., d_out)` for `x (..., d_in)`, `A (r, d_in)`, `B (d_out, r)`, without forming `B A`."""
    return F.linear(F.linear(cast(x, a), a), b, bias)
