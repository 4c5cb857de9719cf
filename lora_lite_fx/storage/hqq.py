"""Weights of HQQ: `HQQLinear`, with 8 to 1 bits. transformers 5 has its `HqqConfig` switched off, so hqq makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import is_instance_of
from .stored_weight import Storage, StoredWeight, detached, fields, not_supported

_PACKED = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""The bits of a value, and how many values an element holds, by the name that HQQ gives to the packing."""


def _read(layer: Any, dtype: torch.dtype) -> StoredWeight | None:
    if not is_instance_of(layer, "hqq", "HQQLinear"):
        return None
    meta = layer.meta
    if not layer.ready or meta is None:
        raise not_supported("HQQLinear", "it is not initialized yet", "Quantize it first.")
    if meta.get("quant_zero") or meta.get("quant_scale") or meta.get("zero_scale") is not None:
        raise not_supported(
            "HQQLinear",
            "its scales or zero points are quantized themselves",
            "Quantize with quant_zero=False, quant_scale=False and offload_meta=False.",
        )
    packing = meta["packing"]
    if packing and packing not in _PACKED:
        raise not_supported("HQQLinear", f"its packing {packing!r} is not known", "Use 8, 4, 3, 2 or 1 bits.")
    bits, values = _PACKED[packing] if packing else (0, 1)
    held = layer.W_q.view(meta["unpack_view_dtype"]) if meta.get("view_as_float") else layer.W_q
    tensors = {"weight": held, "weight_scale": meta["scale"], "weight_zero": meta["zero"]}
    dequantize = Unpacked(tuple(meta["shape"]), bits, values, _rows(meta), meta["compute_dtype"])
    return StoredWeight(f"hqq {meta['nbits']} bits", detached(tensors), dequantize, _store, layer.compute_dtype)


@dataclass(frozen=True)
class Unpacked:
    """`W = (q - z) s` of packed `q`, with a scale `s` and a zero point `z` for each group, to the bits of HQQ.

    Args:
        shape: of `W`.
        bits: of a value; 0 if values are not packed.
        values: how many an element holds: the rows of `q` one below the other, those of the highest bits first.
        rows: of `q`, of which packing may add some.
        dtype: of `W`.
    """

    shape: tuple[int, ...]
    bits: int
    values: int
    rows: int
    dtype: torch.dtype

    def __call__(self, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return `W`."""
        shifts = [self.bits * place for place in reversed(range(self.values))]
        q = torch.cat(fields(packed, self.bits, shifts))[: self.rows] if self.values > 1 else packed
        return ((q.to(self.dtype) - zero) * scale).reshape(self.shape)


def _rows(meta: dict[str, Any]) -> int:
    """Return the rows of the values of a weight, which has one group in each row or in each column."""
    size = meta["shape"][0] * meta["shape"][1]
    if not meta["group_size"]:
        return int(meta["shape"][0])
    return int(meta["group_size"] if meta["axis"] == 0 else size // meta["group_size"])


def _store(module: Any, weight: Tensor) -> None:
    if not module.quant_config:
        raise NotImplementedError("this HQQLinear was loaded, and does not say how it was quantized")
    del module.W_q  # a parameter, to which HQQ assigns a tensor
    module.quantize(weight, **module.quant_config)
    module.W_q = nn.Parameter(module.W_q, requires_grad=False)


HQQ = Storage(("hqq.",), _read)
