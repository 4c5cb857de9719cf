"""Do what depends on parameters alone once, and not in every call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from ..provenance import qualified_names, recorded
from ..tensors import tensor_of
from .graph_pass import GraphPass
from .parameter_work import move_to_front, parameter_work

_LARGEST = 4
"""How many times as large as the adapter's tensors a value may be that is kept from call to call."""


@dataclass(frozen=True)
class HoistParameterWork(GraphPass):
    """Move what adapters compute from their own and frozen tensors alone before the inputs of the graph.

    That is norms, rotations and folded factors; what stands there is run once per change of a parameter. Safe because
    no input enters it, it draws no random numbers and writes nothing: the same tensors give the same values, wherever
    it stands. Values much larger than the adapter's tensors (whole weights, as of a Fourier transform or a Hadamard
    product) stay where they are: kept for every site, they would be a second model.
    """

    def run(self, gm: fx.GraphModule) -> int:
        sizes = {
            str(node.target): tensor_of(gm, str(node.target)).numel()
            for node in gm.graph.find_nodes(op="get_attr")
            if _is_of_adapter(node)
        }
        work = set(parameter_work(gm))
        for node in sorted(work, reverse=True):
            if not work.issuperset(node.users) and not _may_be_kept(node, sizes):
                work.remove(node)
        return move_to_front(gm.graph, sorted(work))


def _is_of_adapter(node: fx.Node) -> bool:
    """Whether `node` reads a tensor of an adapter, and not a frozen one for it."""
    by = recorded(node)
    return by is not None and node.target in qualified_names(by.site, by.adapter, by.position, by.names).values()


def _may_be_kept(node: fx.Node, sizes: dict[str, int]) -> bool:
    """Whether the value of `node` is small beside the adapter tensors that it is computed from, of these `sizes`."""
    if node.op == "get_attr":
        return True
    read = {node}
    pending = [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - read
        read |= new
        pending.extend(new)
    tensors = sum(sizes.get(name, 0) for name in {str(node.target) for node in read})
    value = node.meta.get("val")
    return isinstance(value, Tensor) and math.prod(value.shape) <= _LARGEST * tensors
