"""Take the arguments of a call apart into tensors and the structure around them, and put them together again.

A graph takes and returns tensors, and integers that count (lengths). Everything else an argument holds, a cache's
class or a flag, is part of the structure: it is the same in every call of one graph.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CaptureError

Leaves = dict[str, Any]
"""Tensors and integers by name."""


class Leaf(NamedTuple):
    """A tensor or an integer of the call.

    Args:
        name: unique in the call, and an identifier.
        kind: dtype, number of dimensions and device type of a tensor; empty for an integer.
    """

    name: str
    kind: tuple[Any, ...]


class Constant(NamedTuple):
    """A value that is not a tensor. Its type counts, because `True` equals 1."""

    kind: type
    value: Any


class Tree(NamedTuple):
    """A container: a list, a tuple, a dict, or an object with attributes."""

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]


class Given(NamedTuple):
    """An argument of the call, returned as it was passed."""

    name: str


Structure = Leaf | Constant | Tree | Given

CACHES = ("cache", "past_key_values")
"""What releases of transformers call the cache among the arguments of a call."""

# Integer attributes of caches that count tokens; and attributes that a model does not read.
COUNTERS = frozenset({"cumulative_length", "cumulative_length_int", "max_cache_len"})
UNSEEN = frozenset({"_is_user_defined", "batch_size", "max_batch_size"})

# Constants with a hash: torch.compile of torch 2.12 cannot follow a call of `hash` with some of them.
_HASHABLE = (type(None), bool, int, float, str, torch.dtype, torch.device)


_Counters = dict[tuple[type, str], list[Leaf]]
"""The counters that were found in a value, by the class that has them and their name in it."""


def disassemble(
    value: Any,
    name: str,
    leaves: Leaves,
    given: Mapping[int, str] | None = None,
    counters: _Counters | None = None,
) -> Structure:
    """Take `value` apart.

    Args:
        value: an argument or a result; it is not changed.
        name: what its leaves are called after.
        leaves: the tensors and integers in it are added here.
        given: names of objects, by identity, that are not taken apart.
        counters: those of what `value` is a part of.

    Raises:
        CaptureError: it holds what cannot be compared between calls.
    """
    counters = {} if counters is None else counters
    if given and id(value) in given:  # to ask without need would let torch.compile compile for each batch
        return Given(given[id(value)])
    if isinstance(value, Tensor):
        leaves[name] = value
        return Leaf(name, (value.dtype, value.dim(), value.device.type))
    if isinstance(value, torch.SymInt):
        leaves[name] = value
        return Leaf(name, ())
    keys, parts = _parts(value)
    if parts is None:
        try:
            if not isinstance(value, _HASHABLE):
                hash(value)
        except TypeError as error:
            raise CaptureError(
                f"{name} is a {type(value).__name__}, which cannot be an argument of a graph."
            ) from error
        return Constant(type(value), value)
    structures: list[Structure] = []
    for key, part in zip(keys, parts, strict=True):
        if key in COUNTERS and isinstance(part, (int, torch.SymInt)):
            count = int(part) if isinstance(part, int) else part  # a run that watches sizes has a class of numbers
            equals = counters.setdefault((type(value), key), [])
            structures.append(_counter(count, f"{name}_{key}", leaves, equals))
        else:
            structures.append(disassemble(part, re.sub(r"\W", "_", f"{name}_{key}"), leaves, given, counters))
    return Tree(type(value), tuple(keys), tuple(structures))


def _counter(count: int | torch.SymInt, name: str, leaves: Leaves, others: list[Leaf]) -> Leaf:
    """Return the leaf of a counter: that of an equal one, because the layers of a cache count alike."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for other in others:
        if statically_known_true(leaves[other.name] == count):
            return other
    leaves[name] = count
    others.append(Leaf(name, ()))
    return others[-1]


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the keys and the values of a container; None for both of anything else."""
    if isinstance(value, Mapping):
        return tuple(value), tuple(value.values())
    if isinstance(value, (list, tuple)):
        return range(len(value)), value
    opaque = (type, enum.Enum, nn.Module, FunctionType, MethodType)
    if hasattr(value, "__dict__") and not isinstance(value, opaque):
        state = {key: vars(value)[key] for key in sorted(vars(value).keys() - UNSEEN)}
        return tuple(state), tuple(state.values())
    return None, None


def assemble(structure: Structure, leaves: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    """Put the value together that was taken apart, with these tensors and integers in it."""
    if isinstance(structure, Leaf):
        return leaves[structure.name]
    if isinstance(structure, Constant):
        return structure.value
    if isinstance(structure, Given):
        return (given or {})[structure.name]
    kind: Any = structure.kind
    parts = [assemble(part, leaves, given) for part in structure.parts]
    if issubclass(kind, Mapping):
        items = dict(zip(structure.keys, parts, strict=True))
        return kind(**items) if hasattr(kind, "__dataclass_fields__") else kind(items)
    if issubclass(kind, (list, tuple)):
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    value = kind.__new__(kind)
    vars(value).update(zip(structure.keys, parts, strict=True))
    return value


def restore(old: Any, structure: Structure, leaves: Mapping[str, Any]) -> Any:
    """Bring an object of the caller into the state that `structure` and `leaves` describe.

    Objects stay the same where their class does, and keep attributes that the structure does not have. Returns what
    takes the place of `old`.
    """
    if not isinstance(structure, Tree) or type(old) is not structure.kind or issubclass(structure.kind, Mapping):
        return assemble(structure, leaves)
    if isinstance(old, list):
        before = [*old, *[None] * (len(structure.parts) - len(old))]
        old[:] = [restore(item, part, leaves) for item, part in zip(before, structure.parts, strict=False)]
    elif not isinstance(old, tuple):
        for key, part in zip(structure.keys, structure.parts, strict=True):
            vars(old)[key] = restore(vars(old).get(key), part, leaves)
    else:
        return assemble(structure, leaves)
    return old


def differences(old: Structure | None, new: Structure | None, name: str = "") -> Iterator[str]:
    """Yield the differences between two structures, part by part, in words."""
    if old == new:
        return
    if isinstance(old, Tree) and isinstance(new, Tree) and old.kind is new.kind:
        before, after = dict(zip(old.keys, old.parts, strict=True)), dict(zip(new.keys, new.parts, strict=True))
        for key in before | after:
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
        return
    yield f"{name}: {_in_words(old)} before, {_in_words(new)} now"


def cached_layers(structure: Structure) -> Iterator[tuple[type, dict[str, str]]]:
    """Yield the class of each layer of the caches in a structure, and the names of its leaves by attribute."""
    if not isinstance(structure, Tree):
        return
    own = {key: part.name for key, part in zip(structure.keys, structure.parts, strict=True) if isinstance(part, Leaf)}
    if {"keys", "values"} <= own.keys():
        yield structure.kind, own
        return
    for part in structure.parts:
        yield from cached_layers(part)


def _in_words(structure: Structure | None) -> str:
    if structure is None:
        return "not given"
    if isinstance(structure, Leaf):
        if not structure.kind:
            return "an integer"
        dtype, dim, device = structure.kind
        return f"a {str(dtype).removeprefix('torch.')} tensor of {dim} dimensions on {device}"
    if isinstance(structure, Constant):
        return repr(structure.value)
    return structure.kind.__name__ if isinstance(structure, Tree) else structure.name
