"""Products whose input is not kept for the backward pass, but computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

Recipe = Callable[..., tuple[Tensor]]
"""Computes the input of a product from its sources, `None, *sources -> (x,)`: a method that does not use its object."""


def product_of_recomputed(recipe: Recipe) -> Callable[..., Tensor]:
    """`x, a, *sources -> x a^T`, which keeps `sources` for the backward pass, and not `x`.

    Under `torch.compile`, which chooses what to keep itself, and in transforms (`torch.func`, forward mode) it is the
    plain product.

    Args:
        recipe: with the same operations that `x` was computed with.
    """

    def product(x: Tensor, a: Tensor, *sources: Any) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _is_transformed(x) or _is_transformed(a):
            return F.linear(x, a)
        result: Tensor = _Product.apply(recipe, x, a, *sources)
        return result

    return product


def _is_transformed(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # of a wrapper around a tensor
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


class _Product(torch.autograd.Function):
    """`x a^T`. Its backward pass is made of differentiable operations, so that gradients of gradients are right too."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, x: Tensor, a: Tensor, *sources: Any) -> Tensor:
        kept = [source for source in sources if isinstance(source, Tensor)]
        ctx.save_for_backward(a, *kept)
        ctx.sizes = [source for source in sources if not isinstance(source, Tensor)]
        ctx.is_tensor = [isinstance(source, Tensor) for source in sources]
        ctx.recipe = recipe
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, *kept = ctx.saved_tensors
        tensors, sizes = iter(kept), iter(ctx.sizes)
        sources = [next(tensors if is_tensor else sizes) for is_tensor in ctx.is_tensor]
        with torch.autocast(**ctx.autocast):
            of_x = grad @ a if ctx.needs_input_grad[1] else None
            of_a = None
            if ctx.needs_input_grad[2]:
                (x,) = ctx.recipe(None, *sources)
                of_a = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return None, of_x, of_a, *(None for _ in sources)
