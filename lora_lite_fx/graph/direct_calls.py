"""Call operators by the functions that run them fastest, and ask whether a call may be taken as an ordinary one."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn import functional as F

from ..compat.torch import FakeTensor, is_wrapped, trace_is_active, transform_is_active

aten = torch.ops.aten

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
    aten.sym_numel.default: Tensor.numel,  # where the number is known, Dynamo takes the method alone
    aten.tanh.default: torch.tanh,
    aten.to.dtype: Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def call_directly(graph: fx.Graph) -> None:
    """Replace `torch.ops.aten.add.Tensor` in `graph` by `torch.add`, and the other operators of most models likewise.

    A call of an operator by its overload takes about a microsecond more: at one token that is as much as the arithmetic
    of a small adapter. The functions run the same operators with the same arguments. Passes recognize operators by
    their overloads, so no pass can run on the graph afterwards.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            if node.target is aten.to.dtype and len(node.args) > 4:  # the method takes the memory format by name alone
                node.args, node.kwargs = node.args[:4], {"memory_format": node.args[4]}
            node.target = _FUNCTIONS.get(node.target, node.target)


ORDINARY = (Tensor, Parameter)
"""The types of ordinary tensors: those of other classes, such as DTensors, do what their class makes of it."""


def is_ordinary(tensor: Tensor) -> bool:
    """Check whether the operators of torch alone say what is computed of `tensor`.

    That of a tensor of another class, such as DTensors, is for the class to say. A stand-in without data is ordinary
    where no trace records what is computed of it.
    """
    return type(tensor) in ORDINARY or (type(tensor) is FakeTensor and not trace_is_active())


def is_plain_call(*tensors: Tensor) -> bool:
    """Check whether a function with gradients of its own may take these tensors.

    It may not under `torch.compile`, which chooses itself what to save, nor in transforms and forward-mode AD; nor for
    tensors of other classes, such as DTensors, which do not take all writes in place.
    """
    if torch.compiler.is_compiling() or is_wrapped(*tensors):
        return False
    if not all(map(is_ordinary, tensors)):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)


def can_read_values(tensor: Tensor) -> bool:
    """Check whether a decision may rest on the values of `tensor` now.

    It may not where the tensor has no values, and where a trace, a compiler or a CUDA graph would record the decision
    for all later calls.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta:
        return False
    if transform_is_active() or trace_is_active():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def reading_waits(tensor: Tensor) -> bool:
    """Check whether a process that reads a value of `tensor` waits for all work that it has given to a device."""
    return tensor.device.type != "cpu"
