"""Sum over the processes where tensor parallelism needs it: at the inputs and the outputs of divided linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ..graph.divided import let_be_whole
from ..graph.insertion import insertions, surrounding
from ..passes import GraphPass
from ..sites.finding import find_sites


@dataclass(frozen=True)
class SumAtSites(GraphPass):
    """Let the result of each linear that is divided by inputs be whole, and the gradient of each other one's input.

    So a process sends what Megatron's rules say: two sums of activations per layer and pass. Left alone, DTensors carry
    sums that no process has to the next operation that cannot take them, and choose there anew what costs least: they
    may sum one value several times, or gather weights. Safe because a value and its sum over the processes are one
    DTensor in two forms.

    Args:
        dims: the dimension of `W (d_out, d_in)` that is divided, by the name of the site.
    """

    dims: Mapping[str, int]

    def run(self, gm: fx.GraphModule) -> int:
        adapters = insertions(gm.graph)
        summed: dict[fx.Node, None] = {}  # one sum for siblings, which read one input
        for site in find_sites(gm):
            dim = self.dims.get(site.name)
            for call in site.calls if dim is not None else ():
                _, x, y = surrounding([each for each in adapters if each.site == site.name], call.x, call.y)
                summed[y if dim else x] = None
        for node in summed:
            let_be_whole(gm.graph, node)
        return len(summed)
