"""The rotation of blocks of an input, as OFT's, which adds in place and copies nothing to another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compat.torch import is_wrapped
from ..graph.direct_calls import is_plain_call
from ..graph.operations import with_fast_form
from ..graph.tensors import HALF
from .saved_values import Recomputing, apart, together


@dataclass(frozen=True)
class RotatedBlocks(Recomputing):
    """The fast form of `rotated_blocks`: `x, blocks, *sources -> x + x B`.

    A batched product wants the blocks first and the rows second, and values are the other way round. This multiplies
    where they are, and adds to a copy of `x`. For the backward pass it saves the blocks, and for their gradient the
    sources of `x` if there are any, else `x`. It computes the plain operations under `torch.compile`, which chooses
    what to save itself, under autocast, in transforms, for tensors of several types, and in half precision on a CPU,
    where a product that adds would round more than once.

    Args:
        recipe, sources: see `Recomputing`.
    """

    __name__ = "rotated_blocks"  # as torch.fx names its calls
    is_repeatable: ClassVar[bool] = True

    def __call__(self, x: Tensor, blocks: Tensor, *sources: Any) -> Tensor:
        """Return `(..., n b)`.

        Args:
            x: `(..., n b)`.
            blocks: `(n, b, b)`, what the rotation of each block adds.
            sources: of `x`.
        """
        if not _is_usual(x, blocks):
            return rotated_blocks(x, blocks)
        return _apply(self, x, blocks, *sources) if torch.is_grad_enabled() else _rotated(x, blocks)


@with_fast_form(RotatedBlocks())
def rotated_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return `x + x B`, where `B` has the blocks on its diagonal.

    Args:
        x: `(..., n b)`.
        blocks: `(n, b, b)`, what the rotation of each block adds.
    """
    return x + times_blocks(x.unflatten(-1, (-1, blocks.shape[-1])), blocks).flatten(-2)


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return each row of `x (..., n, b)` times its own block `(n, b, b)`."""
    return torch.einsum("...nk,nkc->...nc", x, blocks)


def _is_usual(x: Tensor, blocks: Tensor) -> bool:
    if not is_plain_call(x, blocks) or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype is blocks.dtype and not (x.dtype in HALF and x.device.type == "cpu")


_ROWS_AT_ONCE = {"cpu": 256}
"""How many rows are read at once: on a CPU as many as its cache holds, because each block is a column of them."""


def _rotated(x: Tensor, blocks: Tensor) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    for target, part in zip(_by_block(result, blocks), _by_block(x, blocks), strict=True):
        target.baddbmm_(part, blocks)
    return result


def _rotated_anew(x: Tensor, blocks: Tensor) -> Tensor:
    """Return the same by operations that have gradients, and that transforms know."""
    by_block = x.reshape(-1, len(blocks), blocks.shape[-1]).transpose(0, 1)
    return torch.baddbmm(by_block, by_block, blocks).transpose(0, 1).reshape(x.shape)


def _outer_products(x: Tensor, of_y: Tensor, blocks: Tensor) -> Tensor:
    """Return the gradient of the blocks, given that of `x B`."""
    total = torch.zeros_like(blocks)
    for part, of_part in zip(_by_block(x, blocks), _by_block(of_y, blocks), strict=True):
        total = torch.baddbmm(total, part.mT, of_part)
    return total


def _by_block(x: Tensor, blocks: Tensor) -> Sequence[Tensor]:
    """Return `(n, rows, b)`, views of a contiguous `x (..., n b)`, a few rows at once."""
    rows = x.reshape(-1, len(blocks), blocks.shape[-1])
    return torch.split(rows.transpose(0, 1), _ROWS_AT_ONCE.get(x.device.type, max(len(rows), 1)), 1)


class _Function(torch.autograd.Function):
    """The operation. Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, rotation: RotatedBlocks, x: Tensor, blocks: Tensor, *sources: Any) -> Tensor:
        saved, ctx.others = apart(rotation.kept(x, sources) if ctx.needs_input_grad[2] else ())
        ctx.save_for_backward(blocks, *saved)
        ctx.rotation, ctx.count = rotation, len(sources)
        return _rotated(x, blocks)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        rotation: RotatedBlocks = ctx.rotation
        blocks, *saved = ctx.saved_tensors
        _, x_needed, blocks_needed, *_ = ctx.needs_input_grad
        of_x = of_blocks = None
        with torch.autocast(of_y.device.type, enabled=False):  # as the operation was computed
            if x_needed:
                in_place = not (torch.is_grad_enabled() or is_wrapped(of_y))
                of_x = (_rotated if in_place else _rotated_anew)(of_y, blocks.mT)
            if blocks_needed:
                x = rotation.input_of(together(saved, ctx.others))
                of_blocks = _outer_products(x, of_y, blocks)
        return None, of_x, of_blocks, *[None] * ctx.count


_apply: Callable[..., Tensor] = _Function.apply
