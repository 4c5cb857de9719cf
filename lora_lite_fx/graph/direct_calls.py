"""How a graph calls operators: their class, and the functions that PyTorch has for them in Python."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

aten = torch.ops.aten

# The class of `torch.ops.aten.add.Tensor` has no public name; schemas and tags are read from its instances.
OpOverload = torch._ops.OpOverload

# What torch.export traces at the borders of a no_grad or autocast region before it makes a region, and so again when it
# captures an opened one. The public forms are context managers, which a graph cannot hold.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp._enter_autocast, torch.amp._exit_autocast

_FUNCTIONS = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.cat.default: torch.cat,
    aten.contiguous.default: Tensor.contiguous,
    aten.div.Tensor: torch.div,
    aten.dropout.default: torch.dropout,
    aten.expand.default: Tensor.expand,
    aten.gelu.default: F.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: F.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.sub.Tensor: torch.sub,
    aten.tanh.default: torch.tanh,
    aten.to.dtype: Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def call_directly(graph: fx.Graph) -> None:
    """Let `graph` call `torch.add` in place of `torch.ops.aten.add.Tensor`, and so for the operators of most models.

    A call of an operator by its overload takes about a microsecond more: at one token that is as much as the arithmetic
    of a small adapter. The functions run the same operators with the same arguments. Nothing that tells operators by
    their overloads can be done with the graph afterwards.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _FUNCTIONS.get(node.target, node.target)
