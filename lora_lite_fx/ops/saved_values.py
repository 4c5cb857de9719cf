"""Keep for a backward pass the operands of an operation, or what the first is computed again from, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Recomputing:
    """Base class of the operations `x, a, *sources, ...`, which may compute `x` again for the gradient of `a`.

    `recompute_inputs` gives them the sources where `x` follows cheaply from values that are saved anyway.

    Args:
        recipe: `None, *sources -> (x,)`, by the operations that `x` was computed with; a method that does not use its
            object. None where `x` is saved.
        sources: how many sources there are: tensors, or sizes.
    """

    recipe: Callable[..., tuple[Tensor]] | None = None
    sources: int = 0

    def kept(self, x: Tensor, sources: Sequence[Any]) -> Sequence[Any]:
        """Return what is kept for the gradient of `a`."""
        return (x,) if self.recipe is None else sources

    def input_of(self, kept: Sequence[Any]) -> Tensor:
        """Return `x`, of what was kept."""
        return kept[0] if self.recipe is None else self.recipe(None, *kept)[0]


def apart(
    values: Sequence[Any], can_be_saved: Callable[[Any], bool] = lambda value: isinstance(value, Tensor)
) -> tuple[list[Tensor | None], list[Any]]:
    """Return the values that `ctx.save_for_backward` takes, and the others; each list has None for those of the other.

    Args:
        values: operands: tensors, sizes and None.
        can_be_saved: tells which are saved.
    """
    saved = [value if can_be_saved(value) else None for value in values]
    return saved, [None if can_be_saved(value) else value for value in values]


def together(saved: Iterable[Tensor | None], others: Sequence[Any]) -> list[Any]:
    """Return the values of which `apart` made these, in their order."""
    return [tensor if other is None else other for tensor, other in zip(saved, others, strict=True)]


def autocast_of(device: str) -> dict[str, Any]:
    """Return the arguments of `torch.autocast` that give the state of now, for a type of device such as `"cpu"`."""
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }
