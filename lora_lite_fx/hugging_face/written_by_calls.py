"""Warn of what a model writes to itself in a call for later ones, which a graph does not write."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.comparable import comparable, revealed
from ..capture.depth.stacks import built_alike, shortened
from ..capture.differences import agree
from ..capture.shared_copy import shared_copy
from .call_structure import CACHES, Leaves

_PLAIN = (Tensor, bool, int, float, str, type(None))
_ABSENT = object()


def warn_of_writes(model: nn.Module, leaves: Leaves, training: bool) -> None:
    """Warn if a call leaves a value in a module or in a config that depends on the values of its arguments.

    One that depends on their sizes alone saves time and nothing else, as a table of positions that grew. `model` is a
    copy that takes the leaves of the call. One layer of a stack shows what all do that are built alike.
    """
    with shortened(model, dict.fromkeys(built_alike(model), 1)):
        if not (written := _written(model, leaves, training)):
            return
        of_others = _written(model, {name: _other(name, leaf) for name, leaf in leaves.items()}, training)
    for (where, name), value in written.items():
        if name != "problem_type" and not agree(of_others.get((where, name), value), value):
            warnings.warn(
                f"{type(model).__name__} keeps {f'{where}.{name}' if where else name} from one call for later ones. A"
                " graph does not write it, so later calls read what was there before adapt. The way out: set it"
                " yourself where a later call reads it, or call the model with the arguments that it is computed for.",
                stacklevel=2,
            )


def _written(model: nn.Module, leaves: Leaves, training: bool) -> dict[tuple[str, str], Any]:
    """Return what a call writes to a copy of a model, by the module and the name of the attribute."""
    twin = shared_copy(model, [name for name, _ in model.named_buffers()]).train(training)
    before = _values(twin)
    try:
        with comparable(twin), revealed(twin), torch.autocast(twin.device.type, enabled=False):
            twin(**{name: leaf.clone() if isinstance(leaf, Tensor) else leaf for name, leaf in leaves.items()})
    except Exception:  # the capture says it
        return {}
    return {place: value for place, value in _values(twin).items() if before.get(place, _ABSENT) is not value}


def _values(model: nn.Module) -> dict[tuple[str, str], Any]:
    places: list[tuple[str, dict[str, Any]]] = []
    for path, module in model.named_modules():
        config = getattr(vars(module).get("config"), "__dict__", {})
        places += [(path, vars(module)), (f"{path}.config".lstrip("."), config)]
    return {(path, name): each for path, has in places for name, each in has.items() if isinstance(each, _PLAIN)}


def _other(name: str, leaf: Any) -> Any:
    """Return a leaf with other values: other numbers, and another last token."""
    if not isinstance(leaf, Tensor) or not leaf.dim() or "mask" in name or name.startswith(CACHES):
        return leaf
    if leaf.is_floating_point():
        return 2 * leaf
    if not name.endswith("_ids"):
        return leaf
    other = leaf.clone()
    other[..., -1] = leaf[..., -1] == 0
    return other
