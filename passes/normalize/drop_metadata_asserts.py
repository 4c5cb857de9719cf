"""Drop the assertions on dtypes that capture records."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...compat.torch import ASSERT_METADATA
from ..pipeline import GraphPass


@dataclass(frozen=True)
class DropMetadataAsserts(GraphPass):
    """Erase the assertions on dtype, device and layout that `torch.export` records around casts.

    Safe because they compute nothing: they only refuse a value that has another dtype than at capture, as values
    under `torch.autocast` do. The guards on shapes and constant inputs (`_guards_fn`) stay.
    """

    def run(self, gm: fx.GraphModule) -> int:
        target = ASSERT_METADATA
        assertions = [node for node in gm.graph.nodes if node.target is target]
        for node in assertions:
            gm.graph.erase_node(node)
        return len(assertions)
