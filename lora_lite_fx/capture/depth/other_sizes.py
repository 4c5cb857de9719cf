"""Find other sizes for the inputs of a call, at which a graph holds too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...compat.torch_modules import children_of
from ..export import GUARDS
from ..omissions import size_in_example
from .program import NotRepeated

Sizes = Mapping[int, Sequence[int]]
"""The sizes of tensors in a call, by their number among its leaves."""

_OTHERS: tuple[Callable[[int], int], ...] = (
    lambda size: 2 * size + 1,
    lambda size: 3 * size,
    lambda size: 2 * size,
    lambda size: size + 1,
    lambda size: size - 1,
)
"""Sizes to try: unlike most numbers of a model, multiples of the example's, and close ones."""


def guessed_sizes(leaves: Sequence[Any]) -> Sizes:
    """Return sizes that a model is likely to take: another batch, and another length of its tokens.

    Args:
        leaves: of the arguments of the call.
    """
    tokens = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.dim() <= 2]
    lengths = {size for tensor in tokens for size in tensor.shape[1:] if size > 1}

    def guess(tensor: Tensor) -> list[int]:
        changed = (size > 1 if dim == 0 else size in lengths for dim, size in enumerate(tensor.shape))
        return [_OTHERS[0](size) if change else size for size, change in zip(tensor.shape, changed, strict=True)]

    return {
        number: guess(leaf)
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and (leaf.dim() < 3 or leaf.is_floating_point())
    }


def sizes_taken(gm: fx.GraphModule, leaves: Sequence[Any], guessed: Sizes, same: Mapping[int, int]) -> Sizes:
    """Return other sizes than those of the example that a graph takes, and none if they are a part of it.

    Args:
        gm: as torch.export makes it.
        leaves: of the arguments that it was made with.
        guessed: sizes to try first.
        same: inputs that the graph does not read, by number, with those whose sizes they have.

    Raises:
        NotRepeated: there are other sizes, and none was found.
    """
    inputs = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder", sort=True)]
    inputs = [inputs[same.get(number, number)] for number in range(len(inputs))]
    values = {
        number: value
        for number, (leaf, value) in enumerate(zip(leaves, inputs, strict=True))
        if isinstance(leaf, Tensor) and isinstance(value, Tensor)
    }
    if all(_is_fixed(size) for value in values.values() for size in value.shape):
        return {}
    for sizes in (guessed, *({number: _other(value, other) for number, value in values.items()} for other in _OTHERS)):
        if _takes(gm, leaves, values, sizes):
            return sizes
    raise NotRepeated("no other sizes were found to check them at")


def _is_fixed(size: int | torch.SymInt) -> bool:
    """Tell whether a size is a number in the graph."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None  # nothing public asks without a guard


def _other(value: Tensor, other: Callable[[int], int]) -> list[int]:
    return [int(size) if _is_fixed(size) else other(size_in_example(size)) for size in value.shape]


def _takes(gm: fx.GraphModule, leaves: Sequence[Any], values: Mapping[int, Tensor], sizes: Sizes) -> bool:
    """Tell whether a graph takes these sizes, and all of them that it leaves open are changed."""
    for number, value in values.items():
        for size, new, old in zip(value.shape, sizes.get(number, ()), leaves[number].shape, strict=False):
            if new != size if _is_fixed(size) else new == old:
                return False
    changed = [
        torch.empty(sizes[number], dtype=leaf.dtype, device="meta") if number in sizes else leaf
        for number, leaf in enumerate(leaves)
    ]
    guards = children_of(gm).get(GUARDS)
    if guards is None:
        return False
    try:
        guards(*changed)
    except AssertionError:
        return False
    return True
