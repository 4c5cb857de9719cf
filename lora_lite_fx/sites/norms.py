"""Find the norms of a graph, as one operator or written out, with the weight and bias that they have."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..graph.provenance import is_size, replaced_tensor
from .dataflow import CASTS, op_name

aten = torch.ops.aten
_POSITIONS = {  # of the weight among the arguments; the bias comes next
    aten.layer_norm.default: 2,
    aten.rms_norm.default: 2,
    aten.group_norm.default: 2,
    aten.batch_norm.default: 1,
    aten.instance_norm.default: 1,
}
_WITHOUT_BIAS = (aten.rms_norm.default,)


class NormTensors(NamedTuple):
    """A norm.

    Args:
        x: its input; of a norm that is written out, what it multiplies with the weight.
        weight: the qualified name of the weight, a parameter.
        bias: that of the bias, or None.
    """

    x: fx.Node
    weight: str
    bias: str | None


def match_norm(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node]) -> NormTensors | None:
    """Return the norm whose weight `node` multiplies with, or None if it is not a norm with a weight.

    Args:
        gm: the graph module.
        node: any of its nodes.
        frozen: the nodes that depend on no input, see `frozen_values`.
    """
    args: tuple[Any, ...] = node.args
    if node.target in _POSITIONS:
        at = _POSITIONS[node.target]
        weight, bias = (_parameter(gm, value) for value in (*args[at : at + 2], None, None)[:2])
        bias = None if node.target in _WITHOUT_BIAS else bias
        return None if weight is None else NormTensors(args[0], weight, bias)
    if node.target is not aten.mul.Tensor or len(args) != 2:
        return None
    for factor, x in (args, args[::-1]):
        if isinstance(x, fx.Node) and x not in frozen and _is_normalized(x):
            weight = _parameter(gm, factor)
            return None if weight is None else NormTensors(x, weight, None)
    return None


def _is_normalized(x: fx.Node) -> bool:
    """Check whether `x` is something divided by a root, such as `h * rsqrt(mean(h ** 2) + eps)`, perhaps cast."""
    x = _uncast(x)
    if op_name(x) not in ("mul", "div"):
        return False
    roots = ("rsqrt",) if op_name(x) == "mul" else ("sqrt", "linalg_vector_norm")
    return any(op_name(_uncast(operand)) in roots for operand in x.all_input_nodes)


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _parameter(gm: fx.GraphModule, node: object) -> str | None:
    """Return the name of the one parameter of one dimension that `node` is computed from, as `1 + w`; else None."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        read = [operand for operand in node.all_input_nodes if not is_size(operand)]
        node = replaced_tensor(node) or (read[0] if len(read) == 1 else None)
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    try:
        tensor: Tensor = gm.get_parameter(str(node.target))
    except AttributeError:
        return None
    return str(node.target) if tensor.dim() == 1 else None
