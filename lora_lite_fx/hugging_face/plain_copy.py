"""Copy an adapted model without its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.placement import Placement
from ..capture.origins.origin import is_hugging_face
from ..capture.shared_copy import shared_copy
from ..execution.layer_modules import plain_class
from ..graph.tensors import delete_tensor, has_attribute
from .own_forward import forget_replaced_forward


def plain_copy(model: Any, placements: Sequence[Placement]) -> Any:
    """Return a copy of an adapted model without adapters, of its own class, over the same weights.

    Args:
        model: is not changed.
        placements: its adapters.
    """
    copied = shared_copy(model)
    for name in (name for placement in placements for name in placement.tensors.values()):
        if has_attribute(copied, name):  # some are shared by several sites, as are modules
            delete_tensor(copied, name)
    for module in copied.modules():
        module.__class__ = _plain_class_of(module)
        for attribute in ("_graphs", "_path"):
            vars(module).pop(attribute, None)
    if is_hugging_face(copied):
        from ..compat.transformers import KEYS_TO_IGNORE_ON_SAVE

        vars(copied).pop(KEYS_TO_IGNORE_ON_SAVE, None)
    forget_replaced_forward(copied)
    return copied


def _plain_class_of(module: nn.Module) -> Any:
    """Return the class that a module has without adapters: of one that is parametrized since, with its parametrization.

    `torch.nn.utils.parametrize` gives a module a subclass of its own, with properties.
    """
    cls: Any = type(module)
    plain = plain_class(cls)
    if plain is cls or not is_parametrized(module) or plain_class(cls.__base__) is cls.__base__:
        return plain
    return type(cls.__name__, (plain,), {name: value for name, value in vars(cls).items() if name != "__dict__"})
