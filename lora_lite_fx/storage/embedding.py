"""Embeddings of torchao and bitsandbytes, whose rows are stored quantized: those that are looked up are dequantized.

They are frozen, and are not a site: an adapter has no table of numbers to read there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import is_instance_of
from .stand_in import StandIn
from .stored_weight import detached, fields, not_supported


@dataclass(frozen=True, eq=False)
class StoredRows:
    """A quantized table of `n` rows.

    Args:
        tensors: those that hold it, of `n` rows but the one called `code`. The first one is called `weight`.
        dequantize: makes rows of rows of these tensors, passed by position.
    """

    tensors: Mapping[str, Tensor]
    dequantize: Callable[..., Tensor]


class DequantizedEmbedding(StandIn):
    """Looks up rows of the tensors in which a quantized embedding stores its table, and dequantizes those.

    Args:
        module: the quantized embedding, which stays as it is. Its tensors are shared.
        stored: its rows.
    """

    def __init__(self, module: nn.Module, stored: StoredRows) -> None:
        super().__init__(module, stored.tensors)
        self.dequantize = stored.dequantize
        layer: Any = module
        self.num_embeddings, self.embedding_dim = int(layer.num_embeddings), int(layer.embedding_dim)
        self.padding_idx = layer.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the ids `input`, `(..., embedding_dim)`."""
        weight, *others = self.names
        # By index, because an embedding of numbers would be a site.
        rows = [getattr(self, name) if name == "code" else getattr(self, name)[input] for name in others]
        return self.dequantize(F.embedding(input, getattr(self, weight)), *rows)

    def extra_repr(self) -> str:
        """Return the line that `repr` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {type(self.original.module).__name__}"


def stored_rows(module: nn.Module) -> StoredRows | None:
    """Return the rows of a quantized embedding; None for other modules, and for forms that are not known here.

    Raises:
        ConfigError: it is not quantized yet, or its rows cannot be read one by one.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if is_instance_of(module, "bitsandbytes", "Embedding4bit"):
        return _four_bit(module)
    if is_instance_of(module, "bitsandbytes", "Embedding8bit"):
        return _eight_bit(module)
    if hasattr(module, "quantization_scheme"):
        why = "compressed-tensors quantized it, and its rows are not read here"
        raise not_supported(type(module).__name__, why, 'Quantize linears alone, with targets=["Linear"].')
    if is_instance_of(module.weight, "torchao", "Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return _of_torchao(module.weight)
    return None


def _of_torchao(weight: Any) -> StoredRows | None:
    rows, columns = weight.block_size
    if rows != 1:
        return None
    count, width = weight.shape
    tensors = {"weight": weight.qdata, "weight_scale": weight.scale.reshape(count, -1)}
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None:
        tensors |= {"weight_zero_point": zero_point.reshape(count, -1)}
    return StoredRows(detached(tensors), Bytes(width // columns, weight.dtype))


def _four_bit(module: Any) -> StoredRows:
    state = module.weight.quant_state
    name = type(module).__name__
    if state is None:
        raise not_supported(name, "it is not quantized yet", 'model.to("cpu") or model.to("cuda") quantizes it.')
    count, width = module.num_embeddings, module.embedding_dim
    if width % state.blocksize or state.nested:
        why = f"blocks of {state.blocksize} cross its rows of {width}, or its scales are quantized"
        raise not_supported(name, why, "Leave the embedding dense.")
    packed = module.weight.data.view(torch.uint8).view(count, width // 2)
    tensors = {"weight": packed, "weight_absmax": state.absmax.view(count, -1), "code": state.code.to(packed.device)}
    return StoredRows(detached(tensors), Nibbles(width // state.blocksize, module.dtype))


def _eight_bit(module: Any) -> StoredRows:
    scale = getattr(module.weight, "SCB", None)
    if scale is None:
        way_out = 'model.to("cpu") or model.to("cuda") quantizes it.'
        raise not_supported(type(module).__name__, "it is not quantized yet", way_out)
    tensors = {"weight": module.weight.data, "weight_scale": scale.view(-1, 1)}
    return StoredRows(detached(tensors), Bytes(1, module.dtype, 127.0))


@dataclass(frozen=True)
class Bytes:
    """Rows of bytes `q`: `(q - z) s / divisor`, with a scale and a zero point for each group of columns.

    Args:
        groups: in a row.
        dtype: of the rows.
        divisor: of the scales.
    """

    groups: int
    dtype: torch.dtype
    divisor: float | None = None

    def __call__(self, values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the rows."""
        scale = scale if self.divisor is None else scale / self.divisor
        values = values.unflatten(-1, (self.groups, -1))
        if self.divisor is None:
            values = values.to(self.dtype)
        if zero_point is not None:
            values = values - zero_point.unsqueeze(-1).to(self.dtype)
        return (values * scale.unsqueeze(-1)).flatten(-2).to(self.dtype)


@dataclass(frozen=True)
class Nibbles:
    """Rows of values of 4 bits, two in a byte, the first one in the high bits: `code[q] s`, a scale for each block.

    Args:
        blocks: in a row.
        dtype: of the rows.
    """

    blocks: int
    dtype: torch.dtype

    def __call__(self, packed: Tensor, scale: Tensor, code: Tensor) -> Tensor:
        """Return the rows."""
        values: Tensor = code[torch.stack(fields(packed, 4, (4, 0)), -1).flatten(-2).long()]
        values = values.unflatten(-1, (self.blocks, -1))
        return (values * scale.unsqueeze(-1)).flatten(-2).to(self.dtype)
