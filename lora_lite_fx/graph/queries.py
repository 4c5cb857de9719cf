"""Questions about one node."""

from __future__ import annotations

import operator
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import OpOverload, is_transform, schema_of
from .insertion import is_inserted
from .regions import closes_region, opens_region
from .tensors import attribute_of, tensor_of
from .writes import written

_TORCH = str(Path(torch.__file__).parent)


def reads_tensor(gm: nn.Module, node: fx.Node) -> bool:
    """Check whether `node` reads a parameter or buffer of the module, and not its mode flag."""
    return node.op == "get_attr" and isinstance(attribute_of(gm, str(node.target)), Tensor)


def value_of(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return a tensor with the shape, dtype and device of the value of parameter work, perhaps without data.

    Return None if they are not known.
    """
    return tensor_of(gm, str(node.target)) if reads_tensor(gm, node) else node.meta.get("val")


def model_name(gm: fx.GraphModule) -> str:
    """Return the name of the class that was captured, which an exported graph has in the module stack of its nodes."""
    for node in gm.graph.nodes:
        for path, kind, *_ in (node.meta.get("nn_module_stack") or {}).values():
            if path == "" and not is_inserted(node):
                return str(getattr(kind, "__qualname__", kind)).rpartition(".")[2]
    return "GraphModule"


def is_on_cpu(gm: fx.GraphModule) -> bool:
    """Check whether all parameters are on the CPU. Programs are derived again when a module moves to another device."""
    return all(parameter.device.type == "cpu" for parameter in gm.parameters())


def dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of the value of `node`, or None if it is not known to be a tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def boolean_masks(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Return the masks of booleans in the graph, each with the calls of attention that read it, in order."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        mask = argument_of(node, "attn_mask")
        if isinstance(mask, fx.Node) and dtype_of(mask) is torch.bool:
            readers.setdefault(mask, []).append(node)
    return readers


def operation_name(node: fx.Node) -> str:
    """Return the plain name of the operation of `node`, such as `dropout`; of an input of the graph its name."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def argument_of(node: fx.Node, *names: str) -> Any:
    """Return the argument of an operator's call with one of these names, given or by default; None if it has none."""
    assert isinstance(node.target, OpOverload)
    for place, argument in enumerate(schema_of(node.target).arguments):
        if argument.name in names:
            given = node.args[place] if place < len(node.args) else argument.default_value
            return node.kwargs.get(argument.name, given)
    return None


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument of that name in a call of an operator, by its place if it is given so."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in schema_of(node.target).arguments]
    if (place := names.index(name)) < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def is_product(node: object) -> bool:
    """Check whether `node` is a product `x A^T` of an adapter."""
    return (
        isinstance(node, fx.Node)
        and is_inserted(node)
        and node.target is torch.ops.aten.linear.default
        and len(node.args) == 2
    )


def is_narrow(node: Any) -> bool:
    """Check whether `node` is a product with an adapter's matrix, or some columns of one."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        parts: Any = node.args[0]
        return parts.target is torch.ops.aten.split_with_sizes.default and is_product(parts.args[0])
    return is_product(node)


def before_cast(x: Any) -> Any:
    """Return the value that an adapter casts to its own type as the node `x`; `x` itself if it is not that."""
    is_cast = isinstance(x, fx.Node) and is_inserted(x) and x.target is torch.ops.aten.to.dtype and len(x.args) == 2
    return x.args[0] if is_cast else x


def source_of(product: fx.Node, work: Container[fx.Node]) -> fx.Node:
    """Return the value that an adapter's product reads, as it was before the adapter cast, scaled or dropped it.

    Args:
        product: the product.
        work: the parameter work of the graph, which is no such value.
    """
    node = product.all_input_nodes[0]
    while is_inserted(node) and not is_narrow(node):
        values = [read for read in node.all_input_nodes if read not in work and read.op != "get_attr"]
        if len(values) != 1:
            break
        node = values[0]
    return node


def obstacle_between(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> str:
    """Return why no computation may move between the places of two nodes; empty if it may.

    Writes to parameters and buffers do not count, because what moves does not read those that are written.
    """
    node = first.next
    while node is not last:
        if opens_region(node) or closes_region(node) or is_transform(node):
            return "a mode, or a level of a transform, begins or ends in between"
        if any(read.op != "get_attr" for read in written(gm, node)):
            return "a tensor is overwritten in between"
        node = node.next
    return ""


def is_deterministic(node: fx.Node) -> bool:
    """Check whether `node` computes the same from the same operands, and has no other effect."""
    if node.target is operator.getitem or getattr(node.target, "is_repeatable", False):
        return True
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and not node.is_impure()
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def line_of(node: fx.Node) -> str:
    """Return the last line of the model's own code that made `node`, in parentheses; empty if it is not known."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [" ".join(lines[i : i + 2]) for i in range(0, len(lines) - 1, 2)]
    own = [frame for frame in frames if f'File "{_TORCH}' not in frame]
    return f" ({own[-1]})" if own else ""
