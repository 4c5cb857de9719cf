"""The layer of a node."""

from __future__ import annotations

import re

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
