"""What a variant that starts from data gets to see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """A sum over a site's inputs on calibration data, as the variant's observer made it.

    Args:
        total: the sum, over all batches, of the tensors that the observer returned.
        tokens: the number of inputs `(d_in,)` seen, padding left out.
    """

    total: Tensor
    tokens: int


@dataclass(frozen=True)
class Batch:
    """The batch of calibration data that the inputs of a site come from.

    Args:
        index: its number among the batches, from 0.
        arguments: what the model was called with, by name.
        inputs: all inputs of the site as the model forms them, `(..., d_in)` in float32 or wider, padding included.
        mask: `(batch, length)`, 1 for tokens and 0 for padding; None if no mask has an entry for each input.
    """

    index: int
    arguments: Mapping[str, Any]
    inputs: Tensor
    mask: Tensor | None


Observe = Callable[[Tensor], Tensor] | Callable[[Tensor, Batch], Tensor]
"""A function that observes the inputs of a site, see `Variant.observer`."""
