"""Weights that torchao's `quantize_` made: tensor subclasses in the place of a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import is_instance_of
from .affine import Affine, AffineRows
from .stored_weight import Storage, StoredWeight, detached

_QUANTIZED_INPUTS = ("act_quant_kwargs", "act_quant_scale", "activation_quantization")
"""Attributes of torchao's tensors that are not None if the product quantizes its input too."""

_ROUNDING_CLASSES = ("LinearActivationQuantizedTensor", "Int8DynActInt4WeightLinear", "Int8DynActInt8WeightLinear")
_AFFINE = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def _read(module: Any, dtype: torch.dtype) -> StoredWeight | None:
    """Return the weight of a linear of which torchao quantized the weight and nothing else, or the rows of a table."""
    weight: Any = module.weight if isinstance(module, (nn.Linear, nn.Embedding)) else None
    if isinstance(module, nn.Embedding):
        is_known = is_instance_of(weight, "torchao", "Int8Tensor", "IntxUnpackedToInt8Tensor")
        return _rows(module) if is_known and weight.block_size[0] == 1 else None
    if weight is None or _rounds_inputs(weight) or not hasattr(weight, "__tensor_flatten__"):
        return None
    names, context = weight.__tensor_flatten__()
    tensors = {f"weight_{name}" if index else "weight": getattr(weight, name) for index, name in enumerate(names)}
    if is_instance_of(weight, "torchao", *_AFFINE):
        sizes = tuple(weight.block_size)
        exact = torch.float32 if is_instance_of(weight, "torchao", "Float8Tensor") else weight.dtype
        dequantize: Any = Affine(tuple(weight.shape), sizes, exact, weight.dtype)
    else:
        dequantize = Rebuilt(type(weight), tuple(names), _Context(context), tuple(weight.shape), weight.stride())
    return StoredWeight(_kind(weight), detached(tensors), dequantize, _store)


def _rows(module: nn.Embedding) -> StoredWeight:
    weight: Any = module.weight
    count, width = weight.shape
    tensors = {"weight": weight.qdata, "weight_scale": weight.scale.reshape(count, -1)}
    if (zero_point := getattr(weight, "zero_point", None)) is not None:
        tensors |= {"weight_zero_point": zero_point.reshape(count, -1)}
    dequantize = AffineRows(width // weight.block_size[1], weight.dtype)
    return StoredWeight(type(module).__name__, detached(tensors), dequantize)


def _rounds_inputs(value: Any) -> bool:
    inner = getattr(value, "original_weight_tensor", None)
    return (
        is_instance_of(value, "torchao", *_ROUNDING_CLASSES)
        or any(getattr(value, name, None) is not None for name in _QUANTIZED_INPUTS)
        or (is_instance_of(inner, "torchao") and _rounds_inputs(inner))
    )


@dataclass(frozen=True)
class Rebuilt:
    """`W` by the code of torchao, for the classes that are not affine: it rebuilds the tensor, and dequantizes it."""

    kind: Any
    names: tuple[str, ...]
    context: _Context
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return `W`."""
        parts = dict(zip(self.names, tensors, strict=True))
        rebuilt = self.kind.__tensor_unflatten__(parts, self.context.value, self.shape, self.stride)
        read = getattr(rebuilt, "get_original_weight", None) or rebuilt.dequantize
        weight: Tensor = read()
        return weight


@dataclass(frozen=True, eq=False)
class _Context:
    """What a class of torchao keeps beside tensors. Two of them are equal if they are written alike."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


def _store(module: Any, weight: Tensor) -> None:
    old = module.weight
    kind, dense, sizes = type(old), weight.to(old.dtype), tuple(old.block_size)
    row = (1, old.shape[1])
    if is_instance_of(old, "torchao", "IntxUnpackedToInt8Tensor"):
        made = kind.from_hp(dense, sizes, old.target_dtype)
    elif is_instance_of(old, "torchao", "Int8Tensor", "Float8Tensor") and sizes in (row, tuple(old.shape)):
        from torchao.quantization import PerRow, PerTensor

        granularity: Any = PerRow() if sizes == row else PerTensor()
        options = {"float8_dtype": old.qdata.dtype} if is_instance_of(old, "torchao", "Float8Tensor") else {}
        made = kind.from_hp(dense, granularity=granularity, **options)
    else:
        raise NotImplementedError(f"{kind.__name__} with blocks of {sizes} cannot be quantized again")
    module.weight = nn.Parameter(made, requires_grad=False)


def _kind(weight: Any) -> str:
    kind = getattr(weight, "target_dtype", None) or getattr(getattr(weight, "qdata", None), "dtype", None)
    return type(weight).__name__ if kind is None else f"torchao {str(kind).removeprefix('torch.')}"


TORCHAO = Storage(("torchao.",), _read, _rounds_inputs)
