"""The mask of attention, read once per call: whether it hides anything, and as the numbers that attention adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph.direct_calls import can_read_values, reading_waits


def needed_mask(mask: Tensor) -> tuple[Tensor | None, bool]:
    """Return what attention needs of a mask of booleans: its `attn_mask` and its `is_causal`.

    A mask that hides nothing is not needed, and one that hides what comes later, and nothing else, is `is_causal`. So
    attention skips what is hidden, and may take kernels that know no masks. On a GPU the call waits once for the
    answer, as the models of transformers do where they leave out their masks.

    Args:
        mask: `(..., queries, keys)`, true for what is seen.

    Returns:
        `(None, False)`, `(None, True)`, or the mask itself and False. It is the mask wherever a trace or a compiler
        would record the answer for good.
    """
    if not can_read_values(mask) or mask.numel() == 0:
        return mask, False
    queries, keys = mask.shape[-2:]
    if reading_waits(mask):
        causal = mask == mask.new_ones(queries, keys).tril()
        answer = int(mask.all() * 2 + causal.all())  # one wait for both
        is_causal = answer == 1 and queries == keys
        return (None if answer > 1 or is_causal else mask), is_causal
    # The last query sees everything in either case. It is asked first because padding on the right ends here.
    if queries > 1 and not mask[..., -1, :].all():
        return mask, False
    if queries == 1 or mask[..., 0, :].all():
        return (None if mask.all() else mask), False
    if queries == keys and torch.equal(mask, mask.new_ones(queries, keys).tril().expand_as(mask)):
        return None, True
    return mask, False


class MaskOfSizes:
    """`mask, *sizes -> attn_mask, is_causal`: do as `needed_mask`, for a mask that follows from sizes alone.

    The values of the mask are read once for all calls with the same sizes.
    """

    __name__ = "needed_mask"  # as torch.fx names its calls

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[bool, bool]] = {}

    def __repr__(self) -> str:
        return "needed_mask of sizes"

    def __call__(self, mask: Tensor, *sizes: int) -> tuple[Tensor | None, bool]:
        """Return `attn_mask` and `is_causal`."""
        if not can_read_values(mask):
            return mask, False
        if sizes not in self._known:
            needed, is_causal = needed_mask(mask)
            self._known[sizes] = needed is None, is_causal
        is_left_out, is_causal = self._known[sizes]
        return None if is_left_out else mask, is_causal


def as_numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask of booleans as numbers: zero for what is seen, minus infinity for the rest; None as it is."""
    return None if mask is None else torch.where(mask, 0.0, -math.inf).to(dtype)
