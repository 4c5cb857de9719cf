"""Convolutions as sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..matching import Call, Dialect, FrozenReader, Match, arguments_of
from .site_input import SiteInput
from .site_kind import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution(SiteKind):
    """A `Conv1d`, `Conv2d` or `Conv3d` with one group. `W`, stored as `(d_out, channels, *kernel)`, multiplies patches.

    The patches are never formed, because a product with `M (m, d_in)` is a convolution to m channels.

    Args:
        kernel: the size of the kernel.
        stride, padding, dilation: as `F.conv2d` takes them.
        groups: the number of groups; more than one is a `GroupedConvolution`.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    name: ClassVar[str] = "conv"
    article: ClassVar[str] = "a convolution"
    other_ranks: ClassVar[tuple[int, ...]] = (-1,)
    why: ClassVar[str] = "the patches that a convolution multiplies are never formed"
    takes_bias: ClassVar[bool] = True

    def input_channels(self, d_in: int) -> int:
        return d_in // math.prod(self.kernel) * self.groups

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
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return convolve(x, factor, None, self.stride, self.padding, self.dilation, self.groups)

    def example(self, stored: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        sizes = [k * d + 7 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return stored.new_empty(2, self.groups * stored.shape[1], *sizes), (1,)

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


@dataclass(frozen=True)
class GroupedConvolution(Convolution):
    """A convolution in groups: its outputs are as many groups, each of which sees its own channels only.

    `W (d_out, d_in)` has the channels of one group. A row belongs to a group by its place, so a product is defined for
    matrices of `d_out` rows only: for updates of `W`, and not for low-rank factors.

    Args:
        outputs: `d_out`.
    """

    outputs: int = 0

    name: ClassVar[str] = "grouped_conv"
    article: ClassVar[str] = "a grouped convolution"
    by_update_only: ClassVar[bool] = True

    def linear(self, x: SiteInput, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        if matrix.shape[0] != self.outputs:
            x._refuse(f"a product with a matrix of {matrix.shape[0]} rows, which belong to no group")
        return super().linear(x, matrix, bias)


_DIMENSIONS: dict[object, int] = {
    operator: dims
    for dims, packet in enumerate((aten.conv1d, aten.conv2d, aten.conv3d), 1)
    for operator in (packet.default, packet.padding)
}
"""The number of dimensions that a kernel has, by operator."""


def _convolution(reader: FrozenReader, node: fx.Node) -> Match | None:
    args = arguments_of(node)
    dims = _DIMENSIONS.get(node.target) or len(args["stride"])
    weight = reader.tensor(args["weight"], 2 + dims, node)
    bias = reader.tensor(args["bias"], 1, node) if args["bias"] is not None else None
    transposed = args.get("transposed") or dims not in (1, 2, 3)
    if weight is None or (args["bias"] is not None and bias is None) or transposed:
        return None
    steps = {key: _for_each_dimension(args[key], dims) for key in ("stride", "padding", "dilation")}
    kernel, groups = tuple(weight.shape[2:]), args["groups"]
    kind = Convolution(kernel=kernel, groups=groups, **steps)
    if groups > 1:
        kind = GroupedConvolution(kernel=kernel, groups=groups, outputs=weight.shape[0], **steps)
    return Match(Call(args["input"], node, node), weight, kind, bias)


def _for_each_dimension(value: Any, dims: int) -> Any:
    """Return a setting of a convolution as one value for each dimension; "same" and "valid" stay."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


CONVOLUTION = Dialect((*_DIMENSIONS, aten.convolution.default), _convolution, (Convolution, GroupedConvolution))
