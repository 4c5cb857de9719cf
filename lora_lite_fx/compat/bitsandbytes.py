"""Hold the private names of bitsandbytes that this library uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .names import offered


def unpacked_for_cpu(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return weight and state in the usual order, of those that a call in evaluation on a CPU reordered for good.

    Args:
        packed: a weight of 4 bits.
        state: of the weight; it is changed.

    Raises:
        AdapterError: the installed release has no function for that.
    """
    unpack = offered(
        "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse",
        "bitsandbytes.functional.dequantize_4bit: returns other bits for the reordered weight",
        "A weight of 4 bits that was called in evaluation on a CPU",
    )
    unpacked: tuple[Tensor, Any] = unpack(packed, state)
    return unpacked
