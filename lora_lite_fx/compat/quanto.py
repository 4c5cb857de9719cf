"""Hold the private names of optimum-quanto that this library uses: the tensors that its weights consist of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import AdapterError
from .names import missing


def in_plain_order(weight: Any) -> Any:
    """Return a weight in the order of its rows: a kernel of 4 bits in bfloat16 keeps its own, which its code reads."""
    return weight.weight_qbits_tensor() if hasattr(weight, "_scale_shift") else weight


def packed_data(weight: Any) -> Tensor:
    """Return the numbers of a weight; those below 8 bits are packed in bytes."""
    data = _part(weight, "_data")
    packed: Tensor = getattr(data, "_data", data)
    return packed


def rows_of(weight: Any) -> int:
    """Return the number of rows of a weight before they are packed."""
    return int(_part(weight, "_data").shape[0])


def scale_of(weight: Any) -> Tensor:
    """Return the scales of a weight."""
    return _part(weight, "_scale")


def shift_of(weight: Any) -> Tensor:
    """Return the shifts of a weight below 8 bits."""
    return _part(weight, "_shift")


def _part(weight: Any, name: str) -> Tensor:
    # It stands in for `weight.dequantize()`, which is public, and would keep a dense copy of each weight.
    part: Tensor | None = getattr(weight, name, None)
    if part is None:
        raise AdapterError(missing(f"optimum.quanto.{type(weight).__name__}.{name}"))
    return part
