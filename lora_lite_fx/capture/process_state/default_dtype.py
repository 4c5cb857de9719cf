"""Tell which graphs depend on `torch.get_default_dtype()`: it is fixed in some operators, and not in others."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ...graph.tensors import attribute_of

_FACTORIES = frozenset(
    {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
)
_CASTS = frozenset({"_to_copy", "to", "type_as", "float", "double", "half", "bfloat16"})
"""Operators that always say the type of their result."""


def default_dtype_of(gm: fx.GraphModule, model: nn.Module) -> torch.dtype | None:
    """Return the default type under which `gm` was captured just now; None if nothing in it depends on that.

    What may depend on it is a value of that type that is made of no value of a floating-point type: of sizes, of
    numbers, of integers by a division, or as a constant of the model's code.

    Args:
        gm: the graph.
        model: what it was captured from.
    """
    default = torch.get_default_dtype()
    named = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in named:
            constant = attribute_of(gm, str(node.target))
            if isinstance(constant, Tensor) and constant.dtype == default:
                return default
        elif node.op.startswith("call_") and _makes(node, default):
            return default
    return None


def _makes(node: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether a call makes a value of this type of none of a floating-point type."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    value = node.meta.get("val")
    if value is None:  # traced symbolically
        return node.op == "call_function" and name in _FACTORIES
    inputs = [each.meta.get("val") for each in node.all_input_nodes]
    if any(isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) for each in inputs):
        return False
    return isinstance(value, Tensor) and value.dtype == dtype and name not in _CASTS


def other_default_dtype(captured: torch.dtype | None) -> str:
    """Return in words how the default type of now differs from that of a graph that depends on it; empty if not."""
    now = torch.get_default_dtype()
    if captured in (None, now):
        return ""
    return f"torch.get_default_dtype() is {now}, and was {captured} when the graph was captured, which depends on it"
