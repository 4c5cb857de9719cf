"""Put modules in the places of others, wherever a model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..compat.torch_modules import children_of

_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def replace_modules(model: nn.Module, new_by_old: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others in `model`, in place; a new module may hold the old one.

    Some modules register their layers and call them by a list of their own, as the heads of OneFormer do. So lists,
    tuples and dicts among the attributes of a module are searched, too.

    Args:
        model: any module, which is not replaced itself.
        new_by_old: the new modules by those in whose places they are put.
    """
    new = set(new_by_old.values())
    for parent in list(model.modules()):
        if parent not in new:
            for name, child in list(children_of(parent).items()):
                if child is not None and child in new_by_old:
                    children_of(parent)[name] = new_by_old[child]
            for name, value in list(vars(parent).items()):
                if name not in _OF_ALL_MODULES:
                    vars(parent)[name] = _replaced(value, new_by_old)


def _replaced(value: Any, new_by_old: Mapping[nn.Module, nn.Module]) -> Any:
    """Return an attribute with new modules in place of old ones; lists and dicts are changed in place."""
    if isinstance(value, nn.Module):
        return new_by_old.get(value, value)
    if type(value) is list:
        value[:] = [_replaced(item, new_by_old) for item in value]
    elif type(value) is tuple:
        return tuple(_replaced(item, new_by_old) for item in value)
    elif type(value) is dict:
        value |= {key: _replaced(item, new_by_old) for key, item in value.items()}
    return value
