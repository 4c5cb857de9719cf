"""Private names of torch that graphs need: the class of operators, borders of regions, and faster functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor
from torch.nn import Parameter
from torch.nn import functional as F

aten = torch.ops.aten

# The class of `torch.ops.aten.add.Tensor` has no public name; schemas and tags are read from its instances.
OpOverload = torch._ops.OpOverload

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Decorate a function that torch.compile calls once, while it compiles, and whose result it takes for a constant.

    `torch.compiler.assume_constant_result` sets this mark alone, but imports the compiler first, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """Decorate a function that torch.compile leaves out of its graphs and calls.

    `torch.compiler.disable` does the same, but imports the compiler when it decorates, and not at the first call.
    """
    return cast(_Function, torch._compile._disable_dynamo(function))


# The functions that torch.export traces at the borders of a no_grad or autocast region, before it makes the region an
# operator. It traces them again when it captures a graph whose regions are opened. The public forms are context
# managers, which a graph cannot hold.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = _enter_autocast, _exit_autocast

# The module of the functions that torch.export traces where a transform of torch.func begins and ends a level.
_TRANSFORMS = "torch._functorch.predispatch"


def is_transform(node: fx.Node) -> bool:
    """Check whether `node` begins or ends a level of `vmap` or another transform, or moves a value across its border.

    Nothing reads the results of those that begin and end a level, and the graph is wrong without them.
    """
    return node.op == "call_function" and getattr(node.target, "__module__", None) == _TRANSFORMS


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


def version_of(tensor: Tensor) -> int:
    """Return how often `tensor` was written to in place."""
    # The version counter has no public name; autograd's documentation calls it by this one.
    return tensor._version


def is_wrapped(*tensors: Tensor) -> bool:
    """Check whether a transform runs on one of the tensors: of `torch.func`, or the one behind `is_grads_batched`."""
    functorch = torch._C._functorch  # there is no public question
    return any(functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t) for t in tensors)


def is_plain_call(*tensors: Tensor) -> bool:
    """Check whether a function with gradients of its own may take these tensors.

    It may not under `torch.compile`, which chooses itself what to save, nor in transforms and forward-mode AD; nor for
    tensors of other classes, such as DTensors, which do not take all writes in place.
    """
    if torch.compiler.is_compiling() or is_wrapped(*tensors):
        return False
    if not all(type(tensor) in ORDINARY for tensor in tensors):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)


# The functions behind public ones that cost several times as much, because each call of a graph asks them.
_is_jit_tracing, _functorch_level = torch._C._is_tracing, torch._C._functorch.maybe_current_level


def transform_is_active() -> bool:
    """Check whether a transform of `torch.func`, forward-mode AD or a trace of `torch.jit` runs this call.

    They need operations that they know: no autograd functions of our own, and no writes to results.
    """
    return _functorch_level() is not None or forward_ad._current_level >= 0 or _is_jit_tracing()


def trace_is_active() -> bool:
    """Check whether `torch.fx` traces this call: symbolically, or by `make_fx`."""
    # The public questions also look at what the caller has looked at, and cost a microsecond.
    return _symbolic_trace._is_fx_tracing_flag or proxy_tensor._CURRENT_MAKE_FX_TRACER is not None


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


@contextmanager
def outside_symbolic_trace() -> Iterator[None]:
    """Leave a symbolic trace for the body: in a trace, each read of a module's parameter is recorded."""
    with _symbolic_trace._maybe_revert_all_patches():
        yield
