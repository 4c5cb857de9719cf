"""Weights that torchao's `quantize_` made: tensor subclasses in the place of a parameter.

torchao need not be installed: its classes are known by their names and read by their attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import is_instance_of
from .affine import Affine
from .stored_weight import StoredWeight, copy_over_tensors, detached

_QUANTIZED_INPUTS = ("act_quant_kwargs", "act_quant_scale", "activation_quantization")
"""Attributes of torchao's tensors that are not None if the product quantizes its input too."""

_AFFINE = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def stored_weight(module: nn.Module, dtype: torch.dtype) -> StoredWeight | None:
    """Return the weight of a linear of which torchao quantized the weight and nothing else; None for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not is_instance_of(weight, "torchao"):
        return None
    assert isinstance(weight, Tensor)
    if quantizes_input(weight) or not hasattr(weight, "__tensor_flatten__"):
        return None
    names, context = weight.__tensor_flatten__()
    tensors = {_name(index, name): getattr(weight, name) for index, name in enumerate(names)}
    if is_instance_of(weight, "torchao", *_AFFINE):
        sizes = tuple(weight.block_size)  # type: ignore[attr-defined]
        exact = torch.float32 if is_instance_of(weight, "torchao", "Float8Tensor") else weight.dtype
        dequantize: Any = Affine(tuple(weight.shape), sizes, exact, weight.dtype)
    else:
        dequantize = Rebuilt(type(weight), tuple(names), _Context(context), tuple(weight.shape), weight.stride())
    return StoredWeight(_kind(weight), detached(tensors), dequantize, Again(module))


def quantizes_input(tensor: Tensor) -> bool:
    """Return whether a product with `tensor` rounds its input too, through which no gradient passes."""
    if not is_instance_of(tensor, "torchao"):
        return False
    inner = getattr(tensor, "original_weight_tensor", None)
    return (
        is_instance_of(tensor, "torchao", "LinearActivationQuantizedTensor")
        or any(getattr(tensor, name, None) is not None for name in _QUANTIZED_INPUTS)
        or (isinstance(inner, Tensor) and quantizes_input(inner))
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


@dataclass(frozen=True, eq=False)
class Again:
    """Makes modules like one, with other values."""

    like: Any

    def __call__(self, weight: Tensor) -> nn.Module:
        """Return a module that holds `weight`, quantized as that of the module is.

        Raises:
            NotImplementedError: the class of the weight does not say how it was quantized.
        """
        old = self.like.weight
        kind, dense, sizes = type(old), weight.to(old.dtype), tuple(old.block_size)
        if is_instance_of(old, "torchao", "IntxUnpackedToInt8Tensor"):
            made = kind.from_hp(dense, sizes, old.target_dtype)
        elif is_instance_of(old, "torchao", "Int8Tensor", "Float8Tensor") and sizes in (_row(old), tuple(old.shape)):
            from torchao.quantization import PerRow, PerTensor

            granularity: Any = PerRow() if sizes == _row(old) else PerTensor()
            options = {"float8_dtype": old.qdata.dtype} if is_instance_of(old, "torchao", "Float8Tensor") else {}
            made = kind.from_hp(dense, granularity=granularity, **options)
        else:
            raise NotImplementedError(f"{kind.__name__} with blocks of {sizes} cannot be quantized again")
        module = copy_over_tensors(self.like)
        module.weight = nn.Parameter(made, requires_grad=False)
        return module  # type: ignore[no-any-return]


def _row(weight: Tensor) -> tuple[int, ...]:
    return (1, weight.shape[1])


def _name(index: int, name: str) -> str:
    return "weight" if index == 0 else f"weight_{name}"


def _kind(weight: Any) -> str:
    kind = getattr(weight, "target_dtype", None) or getattr(getattr(weight, "qdata", None), "dtype", None)
    return type(weight).__name__ if kind is None else f"torchao {str(kind).removeprefix('torch.')}"
