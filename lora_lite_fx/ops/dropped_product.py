"""The product of a dropped input with a narrow matrix, which saves the mask as bits and not the dropped input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat.torch import constant_when_compiled
from ..graph.direct_calls import is_plain_call
from .saved_values import Recomputing, apart, autocast_of, together


@dataclass(frozen=True)
class DroppedProduct(Recomputing):
    """`x, a, *sources, training -> t`: `t = dropout(x) a^T`.

    For the backward pass it saves `a` and a bit of the mask for each element; and for the gradient of `a` the sources
    of `x` if there are any, or `x`. The mask is drawn as the plain operations draw it, so that the numbers are theirs
    for every seed. To draw it again from the state of the generator would save the bits, and takes ten times as long on
    a CPU. It computes the plain operations under `torch.compile`, which chooses what to save itself, and in transforms.

    Args:
        probability: of dropping an element.
        recipe, sources: see `Recomputing`.
    """

    __name__ = "dropped_product"  # as torch.fx names its calls

    probability: float

    def __call__(self, x: Tensor, a: Tensor, *rest: Any) -> Tensor:
        """Return `t (..., r)`.

        Args:
            x: `(..., d_in)`.
            a: `(r, d_in)`.
            rest: the sources of `x`, and whether elements are dropped.
        """
        *sources, training = rest
        if not training or not torch.is_grad_enabled() or not is_plain_call(x, a):
            return F.linear(F.dropout(x, self._probability(), training), a)
        return _apply(self, x, a, *sources)

    @constant_when_compiled  # else torch.compile, asked for dynamic sizes, takes it for an input first
    def _probability(self) -> float:
        return self.probability


class _Function(torch.autograd.Function):
    """The operation. Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, product: DroppedProduct, x: Tensor, a: Tensor, *sources: Any) -> Tensor:
        factors = F.dropout(torch.ones_like(x), product.probability)
        saved, ctx.others = apart(product.kept(x, sources) if ctx.needs_input_grad[2] else ())
        ctx.save_for_backward(a, _packed(factors), *saved)
        ctx.product, ctx.dtype, ctx.count = product, x.dtype, len(sources)
        ctx.autocast = autocast_of(x.device.type)
        return F.linear(x * factors, a)

    @staticmethod
    def backward(ctx: Any, of_t: Tensor) -> tuple[Tensor | None, ...]:
        product: DroppedProduct = ctx.product
        a, bits, *saved = ctx.saved_tensors
        kept = together(saved, ctx.others)
        _, x_needed, a_needed, *_ = ctx.needs_input_grad
        with torch.autocast(**ctx.autocast):
            shape = (*of_t.shape[:-1], a.shape[-1])
            factors = _unpacked(bits, shape, ctx.dtype) / (1 - product.probability)
            of_x = (of_t @ a.to(of_t.dtype)).to(ctx.dtype) * factors if x_needed else None
            of_a = None
            if a_needed:
                dropped = (product.input_of(kept) * factors).to(of_t.dtype)
                of_a = (of_t.flatten(0, -2).mT @ dropped.flatten(0, -2)).type_as(a)
        return None, of_x, of_a, *[None] * ctx.count


_apply: Callable[..., Tensor] = _Function.apply


def _packed(factors: Tensor) -> Tensor:
    """Return which factors are not zero, eight to a byte."""
    kept = (factors != 0).flatten().view(torch.uint8)
    kept = F.pad(kept, (0, -len(kept) % 8)).view(8, -1)
    return (kept << _places(kept)).sum(0, dtype=torch.uint8)


def _unpacked(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return ones and zeros of a shape and type, of what `_packed` returned."""
    kept = (bits >> _places(bits)) & 1
    return kept.flatten()[: math.prod(shape)].view(shape).to(dtype)


def _places(bits: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
