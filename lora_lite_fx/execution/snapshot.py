"""See modules change: their classes, children, attributes, and which tensors they have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from itertools import repeat
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import version_of
from ..compat.torch_modules import buffers_of, children_of, parameters_of
from .layer_modules import plain_class


class Snapshot:
    """Modules as they were at one time besides the values of their tensors.

    It has flat lists, which functions of C compare, because a step of Python for each module would cost more. A call
    asks whether they hold, which takes a fifth of a microsecond a module.

    Args:
        modules: the modules by qualified name.
        tensors: the names of the parameters and buffers of which it is compared whether they are None; None for all.
        registries: further dicts of theirs that are compared.
        settings: attributes that are compared: the attributes of a module, with the name of one of them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Collection[str] | None = None,
        registries: Iterable[dict[Any, Any]] = (),
        settings: Iterable[tuple[Mapping[str, Any], str]] = (),
    ) -> None:
        self._modules = [*modules.values()]
        self._types = [*map(type, self._modules)]
        self._forwards = {kind: kind.forward for kind in map(plain_class, self._types)}
        self._registries = [*map(children_of, self._modules), *registries]
        self._registered = [*map(dict, self._registries)]
        owners: list[tuple[str, dict[str, Any]]] = [
            (f"{path}." if path else "", registry)
            for path, module in modules.items()
            for registry in (parameters_of(module), buffers_of(module))
        ]
        self._sized = [*map(vars, self._modules), *(registry for _, registry in owners)]
        self._sizes = [*map(len, self._sized)]
        places = [
            (registry, name)
            for path, registry in owners
            for name in registry
            if tensors is None or path + name in tensors
        ]
        self._of_tensors, self._tensor_names = [registry for registry, _ in places], [name for _, name in places]
        self._is_none = self._is_none_now()
        pairs = [*settings]
        self._owners, self._names = [owner for owner, _ in pairs], [name for _, name in pairs]
        self._values = [value_to_compare(owner[name]) for owner, name in pairs]

    def holds(self) -> bool:
        """Return False if anything may have changed."""
        try:
            return (
                [*map(type, self._modules)] == self._types
                and [*map(len, self._sized)] == self._sizes
                and self._registries == self._registered
                # Ours on the left, so that `Same` compares, and not the class of an array or a table.
                and self._values == [*map(getitem, self._owners, self._names)]
                and self._is_none_now() == self._is_none
                and [kind.forward for kind in self._forwards] == [*self._forwards.values()]
            )
        except KeyError:  # an attribute was taken away
            return False

    def _is_none_now(self) -> list[bool]:
        return [*map(is_, map(dict.get, self._of_tensors, self._tensor_names), repeat(None))]

    def replaced_forward(self, earlier: Snapshot) -> str:
        """Return the name of a class whose `forward` is another function than it was earlier; empty if none is."""
        for kind, forward in self._forwards.items():
            if earlier._forwards.get(kind, forward) is not forward:
                return str(kind.__name__)
        return ""


class Same:
    """An object to compare with later: it equals itself alone, whatever its class compares, and a tensor until written.

    Args:
        value: the object.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value
        self._writes = _writes_to(value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Same):
            return self.value is other.value and self._writes == other._writes
        return self.value is other and self._writes == _writes_to(other)


def _writes_to(value: Any) -> int:
    """Return how often a tensor was written to; 0 for parameters, which graphs read in each call."""
    is_constant = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return version_of(value) if is_constant and not value.is_inference() else 0


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_CONTAINERS = (list, tuple, dict, set)


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text or the like, or consists of such."""
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if type(value) in _CONTAINERS else isinstance(value, _PLAIN)


def value_to_compare(value: Any) -> Any:
    """Return a value to compare with later: a copy of a container, which may change in place; an object as itself."""
    if type(value) is dict:
        return {key: value_to_compare(item) for key, item in value.items()}
    if type(value) is set:
        return set(value)
    if type(value) in _CONTAINERS:
        return type(value)(map(value_to_compare, value))
    kind: Any = type(value)
    return value if isinstance(value, _PLAIN) or kind.__eq__ is object.__eq__ else Same(value)
