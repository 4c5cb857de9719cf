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
    under `torch.autocast` do, or is on another device, as those of a model without data that gets its tensors later.
    The guards on shapes and constant inputs (`_guards_fn`) stay. The graphs of regions are parts of the graph.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edits = 0
        for part in gm.modules():
            if not isinstance(part, fx.GraphModule):
                continue
            assertions = [node for node in part.graph.nodes if node.target is ASSERT_METADATA]
            for node in assertions:
                part.graph.erase_node(node)
            if assertions and part is not gm:  # the runner recompiles `gm`
                part.recompile()
            edits += len(assertions)
        return edits
