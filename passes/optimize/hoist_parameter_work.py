"""Do what depends on parameters alone once, and not in every call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from ...graph.parameter_work import move_to_front, parameter_work
from ...graph.provenance import qualified_names, recorded
from ...graph.tensors import tensor_of
from ..pipeline import GraphPass

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
        read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        sizes = {name: tensor_of(gm, name).numel() for name in read & _adapter_tensors(gm.graph)}
        work = set(parameter_work(gm))
        for node in sorted(work, reverse=True):
            if not work.issuperset(node.users) and not _may_be_kept(node, sizes):
                work.remove(node)
        return move_to_front(gm.graph, sorted(work))


def _adapter_tensors(graph: fx.Graph) -> set[str]:
    """The qualified names of the tensors of adapters, as any of their nodes tells: some may be gone."""
    found = (by for node in graph.nodes if (by := recorded(node)) is not None)
    adapters = {(by.site, by.adapter, by.position, tuple(by.names)) for by in found}
    return {name for adapter in adapters for name in qualified_names(*adapter).values()}


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
