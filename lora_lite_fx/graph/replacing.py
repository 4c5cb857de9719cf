"""Put a module in the place of another, wherever a model has it."""

from __future__ import annotations

from typing import Any

from torch import nn

_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old` in `model`, in place; `new` itself may hold `old`.

    Some modules register their layers and call them by a list of their own, as the heads of OneFormer do. So lists,
    tuples and dicts among the attributes of a module are searched, too.
    """
    for parent in list(model.modules()):
        if parent is not new:
            for name, child in list(parent._modules.items()):
                if child is old:
                    parent._modules[name] = new
            for name, value in list(vars(parent).items()):
                if name not in _OF_ALL_MODULES:
                    vars(parent)[name] = _replaced(value, old, new)


def _replaced(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """Return an attribute with `new` in place of `old`; lists and dicts are changed in place."""
    if value is old:
        return new
    if type(value) is list:
        value[:] = [_replaced(item, old, new) for item in value]
    elif type(value) is tuple:
        return tuple(_replaced(item, old, new) for item in value)
    elif type(value) is dict:
        value |= {key: _replaced(item, old, new) for key, item in value.items()}
    return value
