"""Remove adapters from a graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...adapters.placement import adapter_tensor_names
from ...graph.provenance import insertions
from ..pipeline import GraphPass, eliminate_dead_code


@dataclass(frozen=True)
class RemoveAdapters(GraphPass):
    """Remove all adapters, leaving the base graph node for node.

    Safe because insertion changes the nodes of the frozen linear only in the input that they read. To undo it, they
    read the adapter's input again, and the readers of the adapter's output read theirs. The provenance of the inserted
    nodes says which these are, so the pass works on a graph loaded from a `.pt2` file too.
    """

    def run(self, gm: fx.GraphModule) -> int:
        inserted = insertions(gm.graph)
        tensors = adapter_tensor_names(gm)
        for insertion in inserted:
            entered_by = insertion.entered_by
            for part, original in ((insertion.inlet, 0), (insertion.outlet, -1)):
                if part is not None:
                    part.replace_all_uses_with(entered_by[original], delete_user_cb=insertion.is_outside)
            for node in reversed(insertion.nodes):
                if not node.users:
                    gm.graph.erase_node(node)
        eliminate_dead_code(gm)
        for name in tensors:
            path, _, attribute = name.rpartition(".")
            delattr(gm.get_submodule(path), attribute)
        _drop_empty_modules(gm, {name.rpartition(".")[0] for name in tensors})
        return len(inserted)


def _drop_empty_modules(gm: fx.GraphModule, paths: set[str]) -> None:
    """Delete the modules at `paths` that exist only to hold an adapter's tensors."""
    for path in paths:
        module = gm.get_submodule(path)
        if not any(True for _ in module.state_dict()) and not list(module.children()):
            gm.delete_submodule(path)
