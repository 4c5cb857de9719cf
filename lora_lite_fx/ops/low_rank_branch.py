"""The record of a site and its adapter, which `LowRankProducts` gets of each, and sums of products in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..graph.tensors import HALF

T = TypeVar("T")


class Branch(NamedTuple, Generic[T]):
    """One site and its adapter, `y = c (x W^T + b + alpha t B^T)`: its tensors, or one value for each of them.

    Args:
        weight: the frozen `W (d_out, d_in)`.
        bias: the frozen `b (d_out,)`, or None.
        b: the adapter's `B (d_out, r)`; or one for each row of the batch, `(batch, d_out, r)`.
        scale: the adapter's `c (d_out,)`, or None.
    """

    weight: T
    bias: T | None
    b: T
    scale: T | None


def flatten(branches: Iterable[Branch[T]]) -> list[T | None]:
    """Return the fields of all branches one after the other, as the operation takes them."""
    return [field for branch in branches for field in branch]


def unflatten(fields: Sequence[Any]) -> list[Branch[Any]]:
    """Return the branches whose fields `flatten` put one after the other."""
    size = len(Branch._fields)
    return [Branch(*fields[start : start + size]) for start in range(0, len(fields), size)]


def as_matrix(tensor: Tensor, a: Tensor) -> Tensor:
    """Return `tensor` as a matrix; as it is if there is an `a` for each row of the batch."""
    return as_rows(tensor) if a.dim() == 2 else tensor


def as_rows(tensor: Tensor) -> Tensor:
    """Return `tensor` as a matrix: a view, if it is the result of a product, which is contiguous."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def add_product(
    total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, in_place: bool = True, scale: Tensor | None = None
) -> Tensor:
    """Return `scale (total + alpha left right)` in the type of `total`, formed in it unless a transform forbids that.

    Args:
        total: a matrix, or one for each row of the batch.
        left, right: the factors. They may be wider than `total`, if it is formed in place.
        alpha: a number.
        in_place: whether `total` may be overwritten.
        scale: of each column; None for 1.
    """
    of_rows = right.dim() == 3  # a matrix for each row of the batch
    if not in_place:
        total = (torch.baddbmm if of_rows else torch.addmm)(total, left, right, alpha=alpha)
        return total if scale is None else total * scale
    if total.dtype is not left.dtype:
        return _add_wider_product(total, left, right, alpha, scale)
    if not adds_in_one_call(total, left):
        total.add_(left @ right, alpha=alpha)
    elif of_rows:
        total.baddbmm_(left, right, alpha=alpha)
    else:
        total.addmm_(left, right, alpha=alpha)
    return total if scale is None else total.mul_(scale)


_ROWS = 128
"""The rows of a sum that a processor casts at once, so that the wider values stay in its cache."""


def _add_wider_product(total: Tensor, left: Tensor, right: Tensor, alpha: float, scale: Tensor | None) -> Tensor:
    """Add a product that is wider than the sum, which is rounded once.

    To add a wider tensor in place takes a processor longer than the product of the site.
    """
    if right.dim() == 3:
        return total.copy_(add_product(total.to(left.dtype), left, right, alpha, scale=scale))
    rows, narrow = as_rows(total), as_rows(left)
    count = _ROWS if total.device.type == "cpu" else max(len(rows), 1)
    for part, columns in zip(rows.split(count), narrow.split(count), strict=True):
        part.copy_(add_product(part.to(left.dtype), columns, right, alpha, scale=scale))
    return total


def adds_in_one_call(total: Tensor, left: Tensor) -> bool:
    """Return whether `addmm` may add a product of `left` to `total`: on CPUs it rounds half precision several times."""
    return total.dtype is left.dtype and not (total.dtype in HALF and total.device.type == "cpu")
