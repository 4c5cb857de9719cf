"""Convolutions as sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import SiteKind
from .site_input import SiteInput


@dataclass(frozen=True)
class Convolution(SiteKind):
    """A `Conv1d` or `Conv2d` with one group. `W` is stored as `(d_out, channels, *kernel)` and applied to patches.

    The patches are never formed, because a product with `M (m, d_in)` is a convolution to m channels.

    Args:
        kernel: the size of the kernel.
        stride, padding, dilation: as `F.conv2d` takes them.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    name: ClassVar[str] = "conv"
    article: ClassVar[str] = "a convolution"
    other_ranks: ClassVar[tuple[int, ...]] = (-1,)
    why: ClassVar[str] = "the patches that a convolution multiplies are never formed"

    @property
    def _channels(self) -> int:
        """The dimension of the channels, counted from the last because there may be no batch."""
        return -1 - len(self.kernel)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def stored_shape(self, d_out: int, d_in: int) -> tuple[int, ...]:
        return d_out, d_in // math.prod(self.kernel), *self.kernel

    def factor(self, stored: Tensor) -> Tensor:
        return stored

    def multiply(self, x: Tensor, factor: Tensor, *routing: Tensor) -> Tensor:
        convolve: Callable[..., Tensor] = F.conv1d if len(self.kernel) == 1 else F.conv2d
        return convolve(x, factor, None, self.stride, self.padding, self.dilation)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        sizes = [k * d + 7 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return stored.new_empty(2, stored.shape[1], *sizes), (1,)

    def enter(self, x: Tensor, dtype: torch.dtype, who: str, *routing: Tensor) -> SiteInput:
        return SiteInput(self, x, x.dtype, who)

    def result(self, y: Tensor, x: Any) -> Tensor:
        return y.movedim(self._channels, -1)

    def leave(self, y: Tensor) -> Tensor:
        return y.movedim(-1, self._channels)

    def cast(self, x: SiteInput, dtype: torch.dtype) -> SiteInput:
        """Return the input in another dtype."""
        return SiteInput(self, x.value.to(dtype), dtype, x.who)

    def dropout(self, x: SiteInput, p: float = 0.5, training: bool = True, inplace: bool = False) -> SiteInput:
        """Return the input with elements dropped, the same ones in all patches."""
        return SiteInput(self, F.dropout(x.value, p, training), x.dtype, x.who)

    def linear(self, x: SiteInput, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution to as many channels as `matrix` has rows, with the channels last."""
        y = self.result(self.multiply(x.value, matrix.unflatten(1, (-1, *self.kernel))), x)
        return y if bias is None else y + bias
