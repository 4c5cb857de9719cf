"""Rotations of skew-symmetric matrices, as OFT's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph.operations import repeatable, with_fast_form


@repeatable
def neumann_rotations_in_float32(upper: Tensor) -> Tensor:
    """Return `neumann_rotations`, computed in float32 where that is the type of `upper` and autocast does not lower it.

    That takes less than half the time, and saves half the bytes. A sum of a few products has the error of a rounding.
    """
    is_safe = upper.dtype is torch.float32 and not torch.is_autocast_enabled(upper.device.type)
    return _rotations(upper) if is_safe else neumann_rotations(upper)


@with_fast_form(neumann_rotations_in_float32)
def neumann_rotations(upper: Tensor) -> Tensor:
    """Return what the rotations by `cayley_neumann` add, in the type of `upper`.

    They are computed in double precision, which autocast leaves alone.

    Args:
        upper: upper triangles by rows, `(n, b (b - 1) / 2)`.
    """
    return _rotations(upper.double()).to(upper.dtype)


def _rotations(upper: Tensor) -> Tensor:
    return cayley_neumann(skew(upper, (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2))


def cayley_neumann(q: Tensor) -> Tensor:
    """Return `2 Q + 2 Q^2 + 2 Q^3 + Q^4`, by two products."""
    square = q @ q
    sum_of_two = 2 * q + square
    return sum_of_two + square + square @ sum_of_two


def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices `(n, size, size)` from upper triangles by rows, `(n, size (size - 1) / 2)`."""
    row, column = torch.triu_indices(size, size, 1, device=upper.device)
    filled = upper.new_zeros(upper.shape[0], size * size).index_copy(1, row * size + column, upper)
    matrix: Tensor = filled.unflatten(1, (size, size))
    return matrix - matrix.mT
