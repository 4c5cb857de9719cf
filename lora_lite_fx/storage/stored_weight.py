"""A storage: how a library keeps quantized weights; and what it reads of a module, the tensors and their formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantized weight `W (d_out, d_in)` of a linear, or the table of an embedding.

    Args:
        kind: what people call the storage, such as `nf4`.
        tensors: those that hold it, by names that a module may give them. The first one is called `weight`. Those of
            an embedding have a row for each id, but for one called `code`.
        dequantize: makes `W`, or rows of the table of rows of the tensors. It takes the tensors by position, is a
            frozen object that compares by value, holds no tensors, and runs operations that every capture can record.
        store: puts another `W (d_out, d_in)` into a copy of the module, quantized in the same way, or raises
            NotImplementedError. None for an embedding.
        compute_dtype: the type in which the module multiplies; None for that of its input.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    dequantize: Callable[..., Tensor]
    store: Callable[[Any, Tensor], None] | None = None
    compute_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Storage:
    """How a library stores weights. Its classes are known by their names, so that it need not be installed.

    Args:
        packages: the packages of the classes that show it, each with a dot at the end: the class of the module, of its
            weight or of its `quantization_scheme`.
        read: takes such a module, and the type that weights have where the storage does not know it. Returns the
            stored weight, or None if it is dense. Raises ConfigError if it cannot be read.
        rounds_inputs: takes a module or tensor of the library. Tells whether its product rounds the input too.
        hook: the attribute of a model for the handle of a hook that decompresses its weights in its first call.
    """

    packages: tuple[str, ...]
    read: Callable[[Any, torch.dtype], StoredWeight | None]
    rounds_inputs: Callable[[Any], bool] | None = None
    hook: str = ""

    def has(self, name: str) -> bool:
        """Tell whether the library has this Python module, or namespace of operators."""
        return f"{name}.".startswith(self.packages)


def not_supported(name: str, why: str, way_out: str) -> ConfigError:
    """Return the error for a module whose weight cannot be read as one matrix.

    Args:
        name: the class of the module.
        why: what it does, as a sentence that goes on after "because".
        way_out: what to do, as a sentence.
    """
    return ConfigError(f"A {name} of the base cannot be adapted, because {why}. The way out: {way_out}")


def detached(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return new objects over the same memory."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def fields(packed: Tensor, bits: int, shifts: Iterable[int]) -> list[Tensor]:
    """Return the values that lie in the bits of the elements of `packed`, one tensor for each place.

    Args:
        packed: integers.
        bits: of a value.
        shifts: the places: the number of the lowest bit.
    """
    mask = (1 << bits) - 1
    return [torch.bitwise_and(torch.bitwise_right_shift(packed, shift), mask) for shift in shifts]


def copy_over_memory(module: nn.Module) -> Any:
    """Return a copy of a module over the same memory, also that of tensors in attributes of its weights and others."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        is_plain = type(tensor) is nn.Parameter  # of which libraries may set the data
        memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if is_plain else tensor
    for value in vars(module).values():
        inside = value if isinstance(value, dict) else vars(value) if hasattr(value, "__dict__") else {}
        memo |= {id(inner): inner for inner in inside.values() if isinstance(inner, Tensor)}
    return copy.deepcopy(module, memo)
