"""The mask of attention, read once per call: whether it hides anything, and as the numbers that attention adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph.direct_calls import can_read_values


def needed_mask(mask: Tensor) -> tuple[Tensor | None, bool]:
    """Return what attention needs of a mask of booleans: its `attn_mask` and its `is_causal`.

    A mask that hides nothing is not needed, and one that hides what comes later, and nothing else, is `is_causal`. So
    attention skips what is hidden, and may take kernels that know no masks. On a GPU the call waits for the values,
    as the models of transformers do where they leave out their masks.

    Args:
        mask: `(..., queries, keys)`, true for what is seen.

    Returns:
        `(None, False)`, `(None, True)`, or the mask itself and False. It is the mask wherever a trace or a compiler
        would record the answer for good.
    """
    if not can_read_values(mask) or mask.numel() == 0:
        return mask, False
    queries, keys = mask.shape[-2:]
    # The last query sees everything in either case. It is asked first because padding on the right ends here.
    if not mask[..., -1, :].all():
        return mask, False
    if mask[..., 0, :].all():
        return (None if mask.all() else mask), False
    if queries == keys and torch.equal(mask, mask.new_ones(queries, keys).tril().expand_as(mask)):
        return None, True
    return mask, False


def as_numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask of booleans as numbers: zero for what is seen, minus infinity for the rest; None as it is."""
    return None if mask is None else torch.where(mask, 0.0, -math.inf).to(dtype)
