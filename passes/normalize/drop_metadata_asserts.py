"""Drop what capture asserts about dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..pipeline import GraphPass


@dataclass(frozen=True)
class DropMetadataAsserts(GraphPass):
    """Erase the assertions on dtype, device and layout that `torch.export` records around casts.

    Safe because they compute nothing: they only refuse to run where a value has another dtype than at capture,
    as it rightly has under `torch.autocast`. The guards on shapes and constant inputs (`_guards_fn`) stay.
    """

    def run(self, gm: fx.GraphModule) -> int:
        found = [n for n in gm.graph.nodes if n.target is torch.ops.aten._assert_tensor_metadata.default]
        for node in found:
            gm.graph.erase_node(node)
        return len(found)
