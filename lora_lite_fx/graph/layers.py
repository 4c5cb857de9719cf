"""The layer of a node."""

from __future__ import annotations

import re
from collections.abc import Container

from torch import fx

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def layer_of(node: fx.Node) -> str | None:
    """Return the name of the layer that `node` belongs to, with the number of the layer's call; None outside layers."""
    if not node.op.startswith("call_"):
        return None
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if match := _LAYER.match(path):
            return f"{match[0]}@{key.partition('@')[2]}"
    return None


def is_layer(name: str) -> bool:
    """Check whether a module of that qualified name is a layer: the first number in the name is its last part."""
    match = _LAYER.match(name)
    return match is not None and match[0] == name


def place_of(node: fx.Node, called: Container[str] = ()) -> str | None:
    """Return the module that is called to run `node`, with the number of its call; None if none is.

    Args:
        node: the node.
        called: the qualified names of modules that are called, besides layers.
    """
    return layer_of(node) or (module_call_of(node, called) if called else None)


def module_call_of(node: fx.Node, names: Container[str]) -> str | None:
    """Return the outermost module among `names` that `node` was captured in, with the number of its call; or None."""
    if node.op.startswith("call_"):
        for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            if path in names:
                return f"{path}@{key.partition('@')[2]}"
    return None
