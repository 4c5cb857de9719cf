"""Helpers for the maths of variants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.tensors import HALF

# Helpers for the maths of variants.


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision, else as it is. For norms and factorizations."""
    return tensor.float() if tensor.dtype in HALF else tensor


def cast(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the dtype of `like`; adds nothing to the graph where the dtypes agree."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def identity_like(square: Tensor) -> Tensor:
    """The identity in the shape, type and place of `square (..., n, n)`, also after the graph was moved."""
    return torch.diag_embed(torch.ones_like(square.diagonal(dim1=-2, dim2=-1)))


def low_rank(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`B A x + bias` in activation space: `x (..., d_in)`, `A (r, d_in)`, `B (d_out, r)` to `(..., d_out)`."""
    return F.linear(F.linear(cast(x, a), a), b, bias)
