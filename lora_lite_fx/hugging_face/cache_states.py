"""Read and write the states of an open cache without a walk through its objects, because each decoded token does both.

A cache is open if all its layers hold states. Two open caches that look alike have one structure: `call_structure.py`
describes it once, and later calls copy the states by their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call_structure import COUNTERS, UNSEEN, Leaf, Leaves, Structure, Tree, disassemble, restore

_PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.device)
_OF_FURTHER_LAYERS = "layer_class_to_replicate"
"""The attribute of a cache that makes layers which it lacks. Open caches in calls of graphs have none, see `opened`."""

State = tuple[int, str, str]
"""A state in a cache: the number of its layer, its attribute there, and the name of its leaf."""


class _Known(NamedTuple):
    structure: Structure
    states: tuple[State, ...]


_known: dict[Any, _Known] = {}
"""What open caches look like, and their structures."""


def disassemble_cache(cache: Any, name: str, leaves: Leaves) -> Structure:
    """Take a cache apart as `disassemble` does, more quickly if it is open and one that looks like it came before."""
    # torch.compile follows the walk, and would guard on what is known.
    look = None if torch.compiler.is_dynamo_compiling() else _look(cache)
    if look is None:
        return disassemble(cache, name, leaves)
    if (known := _known.get((name, look))) is None:
        structure = disassemble(cache, name, leaves)
        if (states := states_of(structure)) is not None:
            _known[name, look] = _Known(structure, states)
        return structure
    layers = cache.layers
    for index, attribute, leaf in known.states:
        leaves[leaf] = layers[index].__dict__[attribute]
    return known.structure


def states_of(structure: Structure) -> tuple[State, ...] | None:
    """Return the states in the structure of a cache, if they are all that varies in it."""
    if not isinstance(structure, Tree) or "layers" not in structure.keys:
        return None
    states: list[State] = []
    for key, part in zip(structure.keys, structure.parts, strict=True):
        if key != "layers":
            if _varies(part):
                return None
            continue
        if not isinstance(part, Tree) or not all(isinstance(layer, Tree) for layer in part.parts):
            return None
        for index, layer in enumerate(part.parts):
            assert isinstance(layer, Tree)
            for attribute, state in zip(layer.keys, layer.parts, strict=True):
                if isinstance(state, Leaf):
                    states.append((index, attribute, state.name))
                elif _varies(state):
                    return None
    return tuple(states)


def give_states(cache: Any, structure: Structure, states: tuple[State, ...] | None, leaves: Mapping[str, Any]) -> Any:
    """Bring a cache of the caller into the state after a call, and return what takes its place, mostly itself.

    Args:
        cache: of the caller.
        structure, states: those of the cache after the call.
        leaves: the results of the graph.
    """
    if states is not None and _is_open_like(cache, structure):
        layers = cache.layers
        for index, attribute, leaf in states:
            layers[index].__dict__[attribute] = leaves[leaf]
        return cache
    of_caller = vars(cache).get(_OF_FURTHER_LAYERS)
    restored = restore(cache, structure, leaves)
    if of_caller is not None:
        setattr(restored, _OF_FURTHER_LAYERS, of_caller)
    return restored


def _is_open_like(cache: Any, structure: Any) -> bool:
    """Tell whether a cache is open and has layers of the same classes as one with that structure."""
    if type(cache) is not structure.kind:
        return False
    layers = structure.parts[structure.keys.index("layers")].parts
    return len(cache.layers) == len(layers) and all(
        type(layer) is part.kind and layer.is_initialized for layer, part in zip(cache.layers, layers, strict=True)
    )


def _varies(structure: Structure) -> bool:
    return isinstance(structure, Leaf) or (isinstance(structure, Tree) and any(map(_varies, structure.parts)))


def _look(cache: Any) -> Any:
    """Return what an open cache looks like, without the values of its states; None if it is not open."""
    from transformers.cache_utils import DynamicCache

    if type(cache) is not DynamicCache:
        return None
    look: list[Any] = []
    counts: dict[Any, list[int]] = {}
    for key, value in cache.__dict__.items():
        if isinstance(value, _PLAIN):
            if key not in UNSEEN:
                look.append((key, type(value), value))
        elif key != "layers":
            return None
    for layer in cache.layers:
        kind, attributes = type(layer), layer.__dict__
        if not attributes.get("is_initialized"):
            return None
        look.append(kind)
        for key, value in attributes.items():
            if key in UNSEEN:
                continue
            if isinstance(value, Tensor):
                look.append((key, value.dtype, value.ndim, value.device))
            elif key in COUNTERS:  # layers that count alike have one leaf
                others = counts.setdefault((kind, key), [])
                if value not in others:
                    others.append(value)
                look.append((key, others.index(value)))
            elif isinstance(value, _PLAIN):
                look.append((key, type(value), value))
            else:
                return None
    return tuple(look)
