"""The rotation of pairs of values, as RoAd's, which saves the values once and makes one result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..graph.direct_calls import is_plain_call
from ..graph.operations import repeatable, with_fast_form


@repeatable
def rotated_pairs_at_once(pairs: Tensor, straight: Tensor, crossed: Tensor) -> Tensor:
    """Return `rotated_pairs` of the same operands, for whose gradients autograd saves `pairs` and no flipped copy.

    It computes the plain operations under `torch.compile`, which chooses what to save itself, in transforms, and for
    tensors of several types.
    """
    if not _is_usual(pairs, straight, crossed):
        return rotated_pairs(pairs, straight, crossed)
    return _apply(pairs, straight, crossed) if torch.is_grad_enabled() else _rotated(pairs, straight, crossed)


@with_fast_form(rotated_pairs_at_once)
def rotated_pairs(pairs: Tensor, straight: Tensor, crossed: Tensor) -> Tensor:
    """Return `pairs * straight + pairs.flip(-2) * crossed`, where dimension -2 has the two of each pair.

    Args:
        pairs: `(..., groups, 2, half)`.
        straight: `(groups, 1 or 2, half)`.
        crossed: `(groups, 2, half)`.
    """
    return pairs * straight + pairs.flip(-2) * crossed


def _is_usual(*tensors: Tensor) -> bool:
    return is_plain_call(*tensors) and len({tensor.dtype for tensor in tensors}) == 1


def _rotated(pairs: Tensor, straight: Tensor, crossed: Tensor) -> Tensor:
    result = pairs * straight
    for one, other in ((0, 1), (1, 0)):
        result.select(-2, one).addcmul_(pairs.select(-2, other), crossed.select(-2, one))
    return result


class _Function(torch.autograd.Function):
    """The operation. Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, straight: Tensor, crossed: Tensor) -> Tensor:
        ctx.save_for_backward(pairs if any(ctx.needs_input_grad[1:]) else None, straight, crossed)
        return _rotated(pairs, straight, crossed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs, straight, crossed = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_pairs = _rotated(gradient, straight, crossed.flip(-2)) if needed[0] else None  # it is its own transpose
        of_straight = _summed(gradient * pairs).sum_to_size(straight.shape) if needed[1] else None
        of_crossed = None
        if needed[2]:
            products = [gradient.select(-2, one) * pairs.select(-2, other) for one, other in ((0, 1), (1, 0))]
            of_crossed = torch.stack([_summed(product.unsqueeze(-2)).squeeze(-2) for product in products], -2)
        return of_pairs, of_straight, of_crossed


def _summed(products: Tensor) -> Tensor:
    """Return the sum over all tokens, as that of the rows of a matrix, which is ten times as fast."""
    shape = products.shape[-3:]
    return products.reshape(-1, shape.numel()).sum(0).view(shape)


_apply: Callable[..., Tensor] = _Function.apply
