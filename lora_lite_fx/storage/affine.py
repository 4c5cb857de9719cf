"""Weights with a scale for each block: how most storages keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """`W = (q - z) s` with a scale `s` and a zero point `z` for each block of `q`, to the bits of the libraries.

    Args:
        shape: of `W`.
        sizes: of a block. Blocks at the end may be cut.
        exact: the type in which it is computed.
        dtype: the type of `W`.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    exact: torch.dtype
    dtype: torch.dtype

    def __call__(self, quantized: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return `W`."""
        pairs = list(zip(self.sizes, self.shape, strict=True))
        if any(total % size for size, total in pairs):
            values = quantized.to(self.exact)
            zero_point = None if zero_point is None else self._spread(zero_point)
            scale = self._spread(scale)
        else:
            # Each dimension that has several blocks is split into their number and their size.
            split = [((total,) if size in (1, total) else (total // size, size)) for size, total in pairs]
            groups = [((total // size,) if size in (1, total) else (total // size, 1)) for size, total in pairs]
            values = quantized.reshape(_joined(split)).to(self.exact)
            zero_point = None if zero_point is None else zero_point.reshape(_joined(groups))
            scale = scale.reshape(_joined(groups))
        if zero_point is not None:
            values = values - zero_point.to(self.exact)
        return (values * scale).reshape(self.shape).to(self.dtype)

    def _spread(self, by_block: Tensor) -> Tensor:
        """Return a tensor of the shape of `W`, of one value for each block."""
        for dim, (size, total) in enumerate(zip(self.sizes, self.shape, strict=True)):
            by_block = by_block.repeat_interleave(size, dim).narrow(dim, 0, total)
        return by_block


def _joined(parts: Sequence[tuple[int, ...]]) -> list[int]:
    return [size for part in parts for size in part]


@dataclass(frozen=True)
class AffineRows:
    """Rows of bytes `q`: `(q - z) s / divisor`, with a scale and a zero point for each group of columns.

    Args:
        groups: in a row.
        dtype: of the rows.
        divisor: of the scales.
    """

    groups: int
    dtype: torch.dtype
    divisor: float | None = None

    def __call__(self, values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the rows."""
        scale = scale if self.divisor is None else scale / self.divisor
        values = values.unflatten(-1, (self.groups, -1))
        if self.divisor is None:
            values = values.to(self.dtype)
        if zero_point is not None:
            values = values - zero_point.unsqueeze(-1).to(self.dtype)
        return (values * scale.unsqueeze(-1)).flatten(-2).to(self.dtype)
