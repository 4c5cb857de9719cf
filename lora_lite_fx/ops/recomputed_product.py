"""The product with a frozen weight that is computed again in the backward pass, and not saved for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph.direct_calls import is_plain_call
from .saved_values import apart, together


@dataclass(frozen=True)
class RecomputedProduct:
    """`x, bias, *sources -> x W^T + b`, with a frozen `W` that `recipe` makes of the sources.

    For the backward pass it saves the sources, and neither `W` nor `x`. A quantized weight is so kept as it is stored.
    It computes the plain operations under `torch.compile`, which chooses what to save itself, and in transforms.

    Args:
        recipe: `None, *sources -> (W,)`.
    """

    __name__ = "recomputed_product"  # as torch.fx names its calls
    is_repeatable: ClassVar[bool] = True

    recipe: Callable[..., tuple[Tensor]]

    def __call__(self, x: Tensor, bias: Tensor | None, *sources: Any) -> Tensor:
        """Return `(..., d_out)`.

        Args:
            x: `(..., d_in)`.
            bias: the frozen `b (d_out,)`, or None.
            sources: tensors, or sizes.
        """
        if _is_usual(x, bias, sources):
            return _apply(self, x, bias, *sources)
        return F.linear(x, self.recipe(None, *sources)[0], bias)


def _is_usual(x: Tensor, bias: Tensor | None, sources: tuple[Any, ...]) -> bool:
    """Return whether `x` alone needs a gradient, and by hand."""
    if not torch.is_grad_enabled() or not x.requires_grad or not is_plain_call(x):
        return False
    return not any(value.requires_grad for value in (bias, *sources) if isinstance(value, Tensor))


def _can_be_saved(value: Any) -> bool:
    """Return whether autograd saves a source: sizes it does not, nor tensors of inference mode, as HQQ makes them."""
    return isinstance(value, Tensor) and not value.is_inference()


class _Function(torch.autograd.Function):
    """The operation. Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, product: RecomputedProduct, x: Tensor, bias: Tensor | None, *sources: Any) -> Tensor:
        saved, ctx.others = apart(sources, _can_be_saved)
        ctx.save_for_backward(*saved)
        ctx.product, ctx.dtype = product, x.dtype
        return F.linear(x, product.recipe(None, *sources)[0], bias)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        sources = together(ctx.saved_tensors, ctx.others)
        (weight,) = ctx.product.recipe(None, *sources)
        with torch.autocast(of_y.device.type, enabled=False):  # the product had the type of its result
            of_x = (of_y @ weight.to(of_y.dtype).conj()).to(ctx.dtype)
        return None, of_x, None, *[None] * len(sources)


_apply: Callable[..., Tensor] = _Function.apply
