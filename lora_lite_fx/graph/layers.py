"""The layer that a node computes a part of."""

from __future__ import annotations

import re

from torch import fx

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def layer_of(node: fx.Node) -> str | None:
    """The layer that `node` computes a part of, with the number of the layer's call; None outside of layers."""
    if not node.op.startswith("call_"):
        return None
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if found := _LAYER.match(path):
            return f"{found[0]}@{key.partition('@')[2]}"
    return None
