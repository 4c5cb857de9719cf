"""Weights of optimum-quanto: `QLinear` with `qint8`, `qint4`, `qint2` or `qfloat8`, weights only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.quanto import in_plain_order, packed_data, rows_of, scale_of, shift_of
from ..errors import is_instance_of
from .stored_weight import Storage, StoredWeight, detached, fields, not_supported


def _read(layer: Any, dtype: torch.dtype) -> StoredWeight | None:
    if not is_instance_of(layer, "optimum", "QLinear"):
        return None
    if layer.activation_qtype is not None:
        why = f"it rounds its input and output to {layer.activation_qtype}, and no right gradient passes through that"
        raise not_supported("QLinear", why, "Quantize weights alone, without activations.")
    if layer.weight_qtype is None:
        raise not_supported("QLinear", "it does not quantize its weight", "Use nn.Linear.")
    if not layer.frozen:
        raise not_supported("QLinear", "it quantizes its weight in each call", "optimum.quanto.freeze(model).")
    weight = in_plain_order(layer.weight)
    tensors = {"weight": packed_data(weight), "weight_scale": scale_of(weight)}
    bits, zero_point = weight.qtype.bits, False
    if bits < 8:
        tensors["weight_shift"] = shift = shift_of(weight)
        zero_point = not shift.dtype.is_floating_point
    dequantize = Grouped(tuple(weight.shape), rows_of(weight), bits, weight.dtype, zero_point)
    return StoredWeight(f"quanto {weight.qtype.name}", detached(tensors), dequantize, _store)


@dataclass(frozen=True)
class Grouped:
    """`W = q s - z` with a scale `s` and a shift `z` for each row or group of `q`, to the bits of quanto.

    Args:
        shape: of `W`.
        rows: of `q`: those of `W`, or groups. Packing may add some.
        bits: of a value. The rows of `q` stand one below the other in the bits of an element, from the lowest.
        dtype: of `W`.
        zero_point: whether `z` is an integer that is subtracted from `q`, and not from `q s`.
    """

    shape: tuple[int, ...]
    rows: int
    bits: int
    dtype: torch.dtype
    zero_point: bool = False

    def __call__(self, packed: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return `W`."""
        if shift is None:
            return scale * packed.to(self.dtype)
        q = torch.cat(fields(packed, self.bits, range(0, 8, self.bits)))[: self.rows]
        if self.zero_point:
            return (scale * (q.to(torch.int8) - shift.to(torch.int8))).reshape(self.shape)
        return (scale * q - shift).reshape(self.shape)


def _store(module: Any, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    module.freeze()
    module.weight.requires_grad_(False)


QUANTO = Storage(("optimum.",), _read)
