"""Weights of bitsandbytes: `Linear4bit` (NF4 and FP4, with doubly quantized scales too), `Linear8bitLt`, embeddings.

bitsandbytes is imported by whoever makes these modules. The graph calls its operators, so it has to be imported before
a graph with 4-bit weights comes back from a file.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compat.bitsandbytes import unpacked_for_cpu
from ..errors import is_instance_of
from .affine import AffineRows
from .stored_weight import Storage, StoredWeight, detached, fields, not_supported


def _read(module: Any, dtype: torch.dtype) -> StoredWeight | None:
    if is_instance_of(module, "bitsandbytes", "Linear4bit"):
        return _four_bit(module)
    if is_instance_of(module, "bitsandbytes", "Linear8bitLt"):
        return _eight_bit(module, dtype)
    if is_instance_of(module, "bitsandbytes", "Embedding4bit"):
        return _four_bit_rows(module)
    return _eight_bit_rows(module) if is_instance_of(module, "bitsandbytes", "Embedding8bit") else None


def _four_bit(module: Any) -> StoredWeight:
    packed, state = module.weight.data, getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise _not_quantized("Linear4bit")
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = unpacked_for_cpu(packed, copy.copy(state))
    absmax = state.absmax
    if absmax.dim() == 2:  # the packing for that call transposes the scales and rounds them, and nothing undoes that
        absmax = absmax.T.reshape(-1).float()
    tensors = {"weight": packed, "weight_absmax": absmax}
    nested = state.state2 if state.nested else None
    if nested is not None:
        tensors |= {"weight_code": nested.code.to(packed.device), "weight_absmax_of_absmax": nested.absmax}
        tensors |= {"weight_offset": state.offset}
    dequantize = FourBit(
        tuple(state.shape), state.dtype, state.blocksize, state.quant_type, nested.blocksize if nested else 0
    )
    store = partial(_store_four_bit, form=dequantize)
    return StoredWeight(state.quant_type, detached(tensors), dequantize, store, module.compute_dtype)


def _eight_bit(module: Any, dtype: torch.dtype) -> StoredWeight:
    if module.state.has_fp16_weights:
        raise not_supported(
            "Linear8bitLt",
            "it has_fp16_weights, which it quantizes in each call",
            "has_fp16_weights=False, or a model that is not quantized.",
        )
    scale = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
    if scale is None or module.weight.dtype is not torch.int8:
        raise _not_quantized("Linear8bitLt")
    tensors = {"weight": module.weight.data, "weight_scale": scale}
    return StoredWeight("int8", detached(tensors), EightBit(dtype), _store_eight_bit)


def _four_bit_rows(module: Any) -> StoredWeight:
    state, name = module.weight.quant_state, type(module).__name__
    if state is None:
        raise _not_quantized(name)
    count, width = module.num_embeddings, module.embedding_dim
    if width % state.blocksize or state.nested:
        why = f"blocks of {state.blocksize} cross its rows of {width}, or its scales are quantized"
        raise not_supported(name, why, "Leave the embedding dense.")
    packed = module.weight.data.view(torch.uint8).view(count, width // 2)
    tensors = {"weight": packed, "weight_absmax": state.absmax.view(count, -1), "code": state.code.to(packed.device)}
    return StoredWeight(name, detached(tensors), FourBitRows(width // state.blocksize, module.dtype))


def _eight_bit_rows(module: Any) -> StoredWeight:
    scale, name = getattr(module.weight, "SCB", None), type(module).__name__
    if scale is None:
        raise _not_quantized(name)
    tensors = {"weight": module.weight.data, "weight_scale": scale.view(-1, 1)}
    return StoredWeight(name, detached(tensors), AffineRows(1, module.dtype, 127.0))


def _not_quantized(name: str) -> Exception:
    return not_supported(name, "it is not quantized yet", 'model.to("cpu") or model.to("cuda") quantizes it.')


@dataclass(frozen=True)
class FourBit:
    """`W` of values of 4 bits, with a scale for each block, which may be of 8 bits itself.

    Args:
        shape, dtype: of `W`.
        block: how many values have one scale.
        quant_type: `nf4` or `fp4`.
        nested: how many scales have one scale; 0 for scales that are not quantized.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    quant_type: str
    nested: int = 0

    def __call__(self, packed: Tensor, absmax: Tensor, *of_absmax: Tensor) -> Tensor:
        """Return `W`."""
        operators = torch.ops.bitsandbytes
        if of_absmax:
            code, scale, offset = of_absmax
            absmax = operators.dequantize_blockwise.default(absmax, scale, code, self.nested, torch.float32) + offset
        weight: Tensor = operators.dequantize_4bit.default(
            packed, absmax, self.block, self.quant_type, list(self.shape), self.dtype
        )
        return weight


@dataclass(frozen=True)
class EightBit:
    """`W` of values of 8 bits, with a scale for each row: the largest magnitude there, which is stored as 127.

    Args:
        dtype: of `W`.
    """

    dtype: torch.dtype

    def __call__(self, quantized: Tensor, scale: Tensor) -> Tensor:
        """Return `W`."""
        return (quantized.to(torch.float32) * (scale.unsqueeze(1) * (1.0 / 127.0))).to(self.dtype)


@dataclass(frozen=True)
class FourBitRows:
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


def _store_four_bit(module: Any, weight: Tensor, form: FourBit) -> None:
    library: Any = importlib.import_module("bitsandbytes")
    module.weight = library.nn.Params4bit(
        weight.to(form.dtype),
        requires_grad=False,
        blocksize=form.block,
        compress_statistics=bool(form.nested),
        quant_type=form.quant_type,
        quant_storage=module.quant_storage,
        module=module,
    ).to(weight.device)


def _store_eight_bit(module: Any, weight: Tensor) -> None:
    library: Any = importlib.import_module("bitsandbytes")
    module.state.reset_grads()
    parameter = library.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    module.weight = parameter.to(weight.device)


BITSANDBYTES = Storage(("bitsandbytes.",), _read)
