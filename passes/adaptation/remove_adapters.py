"""Remove adapters from a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ...errors import AdapterError
from ...graph.insertion import Insertion, forget, insertions, is_size, take_out
from ...graph.tensors import delete_tensor
from ..pipeline import GraphPass, eliminate_dead_code
from .bank_ids import drop_ids


@dataclass(frozen=True)
class RemoveAdapters(GraphPass):
    """Remove adapters, leaving the base graph node for node.

    Safe because insertion changes the nodes of the frozen linear only in the input that they read. To undo it, they
    read the adapter's input again, and the readers of the adapter's output read theirs. The records on the inserted
    nodes say which these are, so the pass works on a graph loaded from a `.pt2` file too.

    Args:
        names: of the adapters to remove; None for all.
    """

    names: tuple[str, ...] | None = None

    def run(self, gm: fx.GraphModule) -> int:
        inserted = [each for each in insertions(gm.graph) if self.names is None or each.adapter_name in self.names]
        tensors = list(dict.fromkeys(name for insertion in inserted for name in insertion.tensors.values()))
        bypass(gm, inserted)
        for name in tensors:
            delete_tensor(gm, name)
        _drop_empty_modules(gm, {name.rpartition(".")[0] for name in tensors})
        drop_ids(gm.graph)
        return len(inserted)


def bypass(gm: fx.GraphModule, inserted: Sequence[Insertion]) -> None:
    """Take adapters out of the graph of `gm`, which keeps their tensors. Sizes that others read stay, as of the base.

    Raises:
        AdapterError: one of them is left; the message names its site.
    """
    take_out(inserted)
    eliminate_dead_code(gm)
    calls = {insertion.call for insertion in inserted}
    for insertion in insertions(gm.graph):
        if insertion.call not in calls:
            continue
        left = [node for node in insertion.nodes if not is_size(node)]
        for node in insertion.nodes:
            if node not in left:
                forget(node)
        read = ((user, node) for node in left for user in node.users if insertion.is_outside(user))
        for user, node in [*read, *((None, node) for node in left)][:1]:
            raise AdapterError(
                f"The {insertion.variant} at {insertion.site!r} cannot be taken out of the graph: another pass has"
                f" changed it, and now {user} reads {node.name} ({node.target}), in the middle of the adapter. The"
                " way out: remove or merge before that pass."
            )


def _drop_empty_modules(gm: fx.GraphModule, paths: set[str]) -> None:
    """Delete the modules at `paths` that exist only to hold an adapter's tensors."""
    for path in paths:
        module = gm.get_submodule(path)
        if not any(True for _ in module.state_dict()) and not list(module.children()):
            gm.delete_submodule(path)
