"""Leave out the adapters that do not act."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...graph.insertion import insertions
from ..pipeline import GraphPass
from .remove_adapters import bypass


@dataclass(frozen=True)
class LeaveOutAdapters(GraphPass):
    """Let the readers of each adapter that does not act read what it replaces; the module keeps its tensors.

    Safe because insertion changes nothing but who reads what, and the records on the nodes say how to undo that
    (`take_out`). It is what `RemoveAdapters` does, for some adapters.

    Args:
        acting: the names of the adapters that stay.
    """

    acting: tuple[str, ...]

    def run(self, gm: fx.GraphModule) -> int:
        idle = [insertion for insertion in insertions(gm.graph) if insertion.adapter_name not in self.acting]
        bypass(gm, idle)
        return len(idle)
