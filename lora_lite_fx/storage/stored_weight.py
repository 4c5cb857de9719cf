"""A stored weight: the tensors that hold it, and the function that makes the weight of them."""

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
    """A quantized weight `W (d_out, d_in)` of a module.

    Args:
        kind: what people call the storage, such as `nf4`.
        tensors: those that hold it, by names that a module may give them. The first one is called `weight`.
        dequantize: makes `W` of these tensors, passed by position. It is a frozen object that compares by value, holds
            no tensors, and runs operations that every capture can record.
        again: makes a module like this one that holds another `W (d_out, d_in)`, quantized in the same way.
        compute_dtype: the type in which the module multiplies; None for that of its input.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    dequantize: Callable[..., Tensor]
    again: Callable[[Tensor], nn.Module]
    compute_dtype: torch.dtype | None = None


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


def copy_over_tensors(module: nn.Module) -> Any:
    """Return a copy of a module over the same memory, also that of tensors in attributes of its weights and others."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        is_plain = type(tensor) is nn.Parameter  # of which libraries may set the data
        memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if is_plain else tensor
    for value in vars(module).values():
        inside = value if isinstance(value, dict) else vars(value) if hasattr(value, "__dict__") else {}
        for inner in inside.values():
            if isinstance(inner, Tensor):
                memo[id(inner)] = inner
    return copy.deepcopy(module, memo)
