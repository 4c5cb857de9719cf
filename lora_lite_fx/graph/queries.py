"""Questions about one node."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from .direct_calls import OpOverload
from .provenance import is_inserted
from .regions import closes_region, opens_region
from .tensors import tensor_of
from .writes import written


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


def is_deterministic(node: fx.Node) -> bool:
    """Whether `node` computes the same from the same operands, and does nothing else."""
    if node.target is operator.getitem:
        return True
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and not node.is_impure()
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
