"""The storages, and which of them a module has."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..compat.torch_modules import parameters_of
from .bitsandbytes_modules import BITSANDBYTES
from .compressed_tensors import COMPRESSED_TENSORS
from .fp8 import FP8
from .hqq import HQQ
from .quanto_linear import QUANTO
from .stored_weight import Storage, StoredWeight
from .torchao import TORCHAO
from .unreadable import UNREADABLE

STORAGES: tuple[Storage, ...] = (TORCHAO, BITSANDBYTES, HQQ, QUANTO, COMPRESSED_TENSORS, FP8, UNREADABLE)
"""All storages, in the order in which a module is looked for in them."""


def stored_weight_of(module: nn.Module, dtype: torch.dtype) -> StoredWeight | None:
    """Return the weight of a quantized linear or embedding; None for other modules.

    Args:
        module: any module.
        dtype: the type of the weight, where a storage does not know it.

    Raises:
        ConfigError: it is quantized in a way that cannot be read.
    """
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None
    # No property is read: a parametrized weight is computed then, and spectral norm changes its buffers.
    parts = (module, parameters_of(module).get("weight"), vars(module).get("quantization_scheme"))
    reads = (storage.read(module, dtype) for storage in _storages_of(*parts))
    return next((stored for stored in reads if stored is not None), None)


def rounds_inputs(value: object) -> bool:
    """Tell whether a module, or a product with a tensor, rounds its input, through which no gradient passes."""
    return any(s.rounds_inputs(value) for s in _storages_of(value) if s.rounds_inputs is not None)


def _storages_of(*values: object) -> list[Storage]:
    """Return the storages of which a library has a class of one of these values."""
    # Every model of transformers has a mixin of an integration, which is not a class of modules.
    classes = (c for v in values for c in type(v).__mro__ if not isinstance(v, nn.Module) or issubclass(c, nn.Module))
    return _storages_with(frozenset(cls.__module__ for cls in classes))


@functools.lru_cache(maxsize=1024)  # of names, because a class may hold a model, as that of each graph module does
def _storages_with(modules: frozenset[str]) -> list[Storage]:
    """Return the storages that have one of these Python modules."""
    return [storage for storage in STORAGES if any(map(storage.has, modules))]
