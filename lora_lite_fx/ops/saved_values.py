"""Keep the operands of an operation for its backward pass: autograd saves tensors alone, and some are sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor


def is_tensor(value: Any) -> bool:
    """Check whether autograd saves a value."""
    return isinstance(value, Tensor)


def apart(
    values: Sequence[Any], can_be_saved: Callable[[Any], bool] = is_tensor
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
