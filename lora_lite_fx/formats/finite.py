"""Refuse adapters with values that are not finite, which training that diverged leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError


def check_finite(tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Check that the tensors of a file hold neither NaN nor infinity.

    Args:
        tensors: by name.
        path: of the file, for the message.
        what: what was not done, such as `"nothing was written"`.

    Raises:
        CheckpointError: one does; the message names it and says how to go on all the same.
    """
    bad = {name: count for name, tensor in tensors.items() if (count := _not_finite(tensor))}
    if bad:
        first = next(iter(bad))
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(tensors)} tensors of the adapter hold NaN or infinity"
            f" ({first}: {bad[first]} of {tensors[first].numel()} values), so {what}. Training has probably diverged;"
            " take an earlier state. The way out, if they are meant: allow_nonfinite=True."
        )


def _not_finite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # Types of 8 bits have no isfinite of their own.
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return values.numel() - int(torch.isfinite(values).sum())
