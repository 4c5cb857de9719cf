"""Weights of transformers' `FP8Linear`: float8 with a scale for each block, as DeepSeek stores them.

Its kernel rounds inputs to float8 and runs on GPUs only; its backward pass ignores that rounding. Here inputs are not
rounded, so that the gradient is right. transformers dequantizes such a model when it loads it where no GPU is.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import is_instance_of
from .affine import Affine
from .stored_weight import Storage, StoredWeight, detached, not_supported


def _read(layer: Any, dtype: torch.dtype) -> StoredWeight | None:
    is_linear = is_instance_of(layer, "transformers", "FP8Linear")
    if not is_linear or is_instance_of(layer, "transformers", "FP8GroupedLinear") or layer.weight.element_size() > 1:
        return None
    if not layer.weight.dtype.is_floating_point:
        raise not_supported(
            "FP8Linear", "its values have 4 bits, and are packed", "Load it with FineGrainedFP8Config(dequantize=True)."
        )
    shape = tuple(layer.weight.shape)
    tensors = {"weight": layer.weight, "weight_scale_inv": layer.weight_scale_inv}
    affine = Affine(shape, tuple(layer.block_size or shape), torch.float32, dtype)
    # No cast that does nothing, because torch.export takes its result for the stored scale from then on.
    dequantize = affine if layer.weight_scale_inv.dtype is torch.float32 else OfExponents(affine)
    return StoredWeight("fp8", detached(tensors), dequantize, _store)


@dataclass(frozen=True)
class OfExponents:
    """`W` of values and of scales that are powers of two, of which the exponent is stored.

    Args:
        affine: makes `W` of the values and of scales in float32.
    """

    affine: Affine

    def __call__(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return `W`."""
        return self.affine(values, scale.to(torch.float32))


def _store(module: Any, weight: Tensor) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    old = module.weight_scale_inv
    form = "float" if old.dtype is torch.float32 else "ue8m0"
    config = SimpleNamespace(weight_block_size=module.block_size, scale_fmt=form)
    quantize: Any = Fp8Quantize(SimpleNamespace(quantization_config=config))
    made = quantize.convert({"weight": weight})
    if "weight_scale_inv" not in made:
        raise NotImplementedError("its blocks do not divide it")
    module.weight = nn.Parameter(made["weight"], requires_grad=False)
    module.weight_scale_inv = nn.Parameter(made["weight_scale_inv"].reshape(old.shape), requires_grad=False)


FP8 = Storage(("transformers.integrations.",), _read)
