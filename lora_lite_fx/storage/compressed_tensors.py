"""Weights of compressed-tensors: linears whose scheme quantizes the weight alone, packed or not.

transformers loads them compressed, and the first call of the model decompresses them for good. An adapted copy leaves
them compressed, and computes the weight in each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch_modules import parameters_of
from ..errors import ConfigError
from .affine import Affine
from .stored_weight import Storage, StoredWeight, detached, fields, not_supported

_PLAIN = ("naive-quantized", "int-quantized", "float-quantized")
_PACKED = "pack-quantized"
_WORD = 32


def _read(module: Any, dtype: torch.dtype) -> StoredWeight | None:
    scheme = module.quantization_scheme
    if isinstance(module, nn.Embedding):
        why = "compressed-tensors quantized it, and its rows are not read here"
        raise not_supported(type(module).__name__, why, 'Quantize linears alone, with targets=["Linear"].')
    if not isinstance(module, nn.Linear):
        return None
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise _refused("it rounds its inputs or outputs, and no right gradient passes through that")
    if scheme.weights is None:
        return None
    layer: Any = module
    status = _name(layer.quantization_status)
    if status == "decompressed":
        why = "a call of the model decompressed it, and put a cache in the place of its parameters"
        raise _refused(why, "load the model again, and adapt it before its first call.")
    kind = _name(scheme.format)
    if status != "compressed" or kind is None:
        raise _refused("it rounds its weight in each call", "ModelCompressor.compress_model(model).")
    bits, scale = scheme.weights.num_bits, layer.weight_scale
    packed = kind == _PACKED and _WORD % bits == 0
    if not packed and kind not in _PLAIN:
        raise _refused(f"its format {kind} of {bits} bits is not known here")
    shape = (int(layer.out_features), int(layer.in_features))
    tensors = {"weight": layer.weight_packed if packed else layer.weight, "weight_scale": scale}
    if getattr(layer, "weight_zero_point", None) is not None:
        tensors |= {"weight_zero_point": layer.weight_zero_point}
    affine = Affine(shape, _sizes(scheme.weights, shape), scale.dtype, scale.dtype)
    dequantize = Packed(affine, bits) if packed else affine
    return StoredWeight(f"{kind} {bits} bits", detached(tensors), dequantize, _store)


def _refused(why: str, way_out: str = "load it with CompressedTensorsConfig(dequantize=True).") -> ConfigError:
    return not_supported("Linear of compressed-tensors", why, way_out)


def _name(choice: Any) -> Any:
    """Return a choice of compressed-tensors, an enum or already a string, as a string; None for none."""
    return getattr(choice, "value", choice)


def _sizes(weights: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of the blocks that have one scale."""
    strategy = _name(weights.strategy)
    if strategy in ("group", "channel"):
        return (1, weights.group_size if strategy == "group" else shape[1])
    if strategy in ("block", "tensor"):
        return tuple(weights.block_structure) if strategy == "block" else shape
    raise _refused(f"its strategy {strategy} is not known here")


@dataclass(frozen=True)
class Packed:
    """`W` of integers that are packed into words: along the rows, and zero points along the columns.

    Args:
        affine: makes `W` of the integers.
        bits: of a value. They are stored from the lowest bits of a word, and shifted to be at least zero.
    """

    affine: Affine
    bits: int

    def __call__(self, packed: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return `W`."""
        rows, columns = self.affine.shape
        if zero_point is not None:
            zero_point = self._unpacked(zero_point.mT, rows).mT
        return self.affine(self._unpacked(packed, columns), scale, zero_point)

    def _unpacked(self, words: Tensor, columns: int) -> Tensor:
        values = torch.stack(fields(words, self.bits, range(0, _WORD, self.bits)), -1)
        return values.flatten(1)[:, :columns] - (1 << (self.bits - 1))


def _store(module: Any, weight: Tensor) -> None:
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization.utils import calculate_qparams

    weights, shape = module.quantization_scheme.weights, tuple(weight.shape)
    old = module.weight_scale
    dense = weight.to(old.dtype)
    least, largest = _extremes(dense, _sizes(weights, shape))
    scale, zero_point = calculate_qparams(least, largest, weights)
    for name in ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point"):
        parameters_of(module).pop(name, None)
    module.weight = nn.Parameter(dense, requires_grad=False)
    module.weight_scale = nn.Parameter(scale.reshape(old.shape), requires_grad=False)
    if not weights.symmetric:
        module.weight_zero_point = nn.Parameter(zero_point.reshape(module.weight_scale.shape), requires_grad=False)
    compress_module(module)


def _extremes(weight: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each block of a weight. Those at the end may be cut."""
    padding = [(-total) % size for size, total in zip(sizes, weight.shape, strict=True)]
    padded = nn.functional.pad(weight, (0, padding[1], 0, padding[0]))
    blocks = padded.unflatten(1, (-1, sizes[1])).unflatten(0, (-1, sizes[0]))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


COMPRESSED_TENSORS = Storage(("compressed_tensors.",), _read, hook="ct_decompress_hook")
