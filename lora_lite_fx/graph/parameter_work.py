"""Parameter work: the nodes that depend on the tensors of the module alone, and not on inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .insertion import is_inserted
from .queries import is_deterministic, reads_tensor
from .regions import closes_region, opens_region
from .writes import written_attributes


def parameter_work(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the inserted nodes that depend on no input of the graph, draw no random numbers and write nothing.

    They are in graph order. Nodes in a region with a mode of autograd or autocast of its own are left out, because
    elsewhere they would compute something else. So are those that read a tensor which the graph writes to.
    """
    written = _written_of_the_base(gm)
    known: set[fx.Node] = set()
    work: list[fx.Node] = []
    regions = 0
    for node in gm.graph.nodes:
        regions += opens_region(node) - closes_region(node)
        is_tensor = reads_tensor(gm, node) and node.target not in written
        computed = known.issuperset(node.all_input_nodes) and is_inserted(node) and not regions
        if is_tensor or (computed and is_deterministic(node)):
            known.add(node)
            if is_inserted(node):
                work.append(node)
    return work


def _written_of_the_base(gm: fx.GraphModule) -> set[str]:
    """Return the names of the tensors that adapters read of the base, and that the graph writes to."""
    reads = [node for node in gm.graph.find_nodes(op="get_attr") if not is_inserted(node)]
    names = {str(node.target) for node in reads if any(map(is_inserted, node.users))}
    return names.intersection(written_attributes(gm)) if names else names


def first_input(graph: fx.Graph) -> fx.Node:
    """Return the node before which parameter work stands: the first input, or the output if there is none."""
    return next((node for node in graph.nodes if node.op == "placeholder"), graph.output_node())


def move_to_front(graph: fx.Graph, nodes: Iterable[fx.Node]) -> int:
    """Move parameter work, given in graph order, before the inputs of `graph`; return how many nodes moved."""
    first = first_input(graph)
    moved = 0
    for node in nodes:
        if first < node:
            for operand in node.all_input_nodes:
                if first < operand:  # a tensor that the base reads too
                    first.prepend(operand)
            first.prepend(node)
            node.meta.pop("nn_module_stack", None)  # it runs for the whole model now, and not in a layer
            moved += 1
    return moved
