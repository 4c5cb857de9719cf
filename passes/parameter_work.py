"""Which nodes of a graph depend on its module's tensors alone, and how to move them to its front."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from ..capture import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED
from ..provenance import is_inserted
from ..tensors import tensor_of, written


def parameter_work(gm: fx.GraphModule) -> list[fx.Node]:
    """The inserted nodes that depend on no input of the graph, draw no random numbers and write nothing; in order.

    Nothing is computed elsewhere that stands in a region with a mode of autograd or autocast of its own.
    """
    known: set[fx.Node] = set()
    found: list[fx.Node] = []
    regions = 0
    for node in gm.graph.nodes:
        regions += opens_region(node) - closes_region(node)
        computed = is_inserted(node) and not regions and is_deterministic(node)
        if reads_tensor(gm, node) or (computed and known.issuperset(node.all_input_nodes)):
            known.add(node)
            if is_inserted(node):
                found.append(node)
    return found


def reads_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a parameter or buffer of the module, and not its mode flag."""
    if node.op != "get_attr":
        return False
    path, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(gm.get_submodule(path), name), Tensor)


def value_of(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """A tensor of the shape, dtype and device of parameter work, if they are known: it may be without data."""
    return tensor_of(gm, str(node.target)) if reads_tensor(gm, node) else node.meta.get("val")


def is_on_cpu(gm: fx.GraphModule) -> bool:
    """Whether all parameters are there. What is derived from a graph is derived anew when it is moved."""
    return all(parameter.device.type == "cpu" for parameter in gm.parameters())


def first_input(graph: fx.Graph) -> fx.Node:
    """The node before which parameter work stands."""
    return next((node for node in graph.nodes if node.op == "placeholder"), graph.output_node())


def move_to_front(graph: fx.Graph, nodes: Iterable[fx.Node]) -> int:
    """Move parameter work, given in order, before the inputs of `graph`; returns how many nodes were not there."""
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


def is_product(node: object) -> bool:
    """Whether `node` is `x A^T`, inserted."""
    return (
        isinstance(node, fx.Node)
        and is_inserted(node)
        and node.target is torch.ops.aten.linear.default
        and len(node.args) == 2
    )


def must_not_move(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether between two nodes a tensor that is no parameter or buffer is written to, or a region begins or ends."""
    node = first.next
    while node is not last:
        if opens_region(node) or closes_region(node) or any(read.op != "get_attr" for read in written(gm, node)):
            return True
        node = node.next
    return False


def opens_region(node: fx.Node) -> bool:
    """Whether a region with a mode of autograd or autocast of its own begins at `node`."""
    return node.target in (ENTER_AUTOCAST, torch.is_grad_enabled)


def closes_region(node: fx.Node) -> bool:
    """Whether such a region ends at `node`: the mode that was remembered at its beginning is set again."""
    return node.target is EXIT_AUTOCAST or (node.target is SET_GRAD_ENABLED and isinstance(node.args[0], fx.Node))


def is_deterministic(node: fx.Node) -> bool:
    """Whether `node` computes the same from the same operands, and does nothing else."""
    if node.target is operator.getitem:
        return True
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and not node.is_impure()
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
