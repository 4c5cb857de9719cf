"""Trace a function on fake tensors, which have shapes and no data."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...compat.torch import FakeTensor, FakeTensorMode
from ...graph.calls_and_traces import tracing
from ..autograd_functions import keeping_functions

T = TypeVar("T")

_COPIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default)


def fake_input(node: fx.Node, example: Tensor | None = None, fixed: Sequence[int] = ()) -> Tensor:
    """Return a fake tensor for the value of `node`.

    A symbolically traced graph knows no shapes. There the fake tensor is made from `example`, with every dimension of
    any size but for the `fixed` ones. Inside `vmap` a value belongs to a level that exists no more, but its number of
    dimensions is known: dimensions before those of `example` are added, or left out.
    """
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value
    assert example is not None
    return fake_of(example, fixed, more=value.dim() - example.dim() if isinstance(value, Tensor) else 0)


def fake_of(example: Tensor, fixed: Sequence[int] | None = (), more: int = 0) -> Tensor:
    """Return a fake tensor like `example`, with every dimension of any size but for the `fixed` ones.

    Args:
        example: the tensor; its values do not matter.
        fixed: dimensions of it; None for all.
        more: the number of dimensions to add before those of `example`; of those to leave out, if negative.
    """
    example = example.expand(*[2] * more, *example.shape) if more > 0 else example[(0,) * -more]
    if fixed is None:
        return FakeTensorMode().from_tensor(example.detach(), static_shapes=True)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    fixed = [dim + more for dim in fixed]
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        [DimDynamic.STATIC if dim in fixed else DimDynamic.DYNAMIC for dim in range(example.dim())]
    )
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(example.detach(), symbolic_context=dynamic)


def fake_like(tensor: Tensor, beside: Tensor) -> Tensor:
    """Return a fake tensor for `tensor` that can be used together with the fake tensor `beside`."""
    return _mode_of(beside).from_tensor(tensor.detach(), static_shapes=True)


def run_on_fixed_sizes(function: Callable[..., T], tensors: Sequence[Tensor]) -> T:
    """Return what `function` returns for fake tensors like `tensors` whose sizes are numbers.

    That is several times as quick as with symbols. Unlike in a trace, what runs is not recorded.
    """
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    with FakeTensorMode():
        sizes = ([optimization_hint(size, 2) for size in tensor.shape] for tensor in tensors)
        pairs = zip(sizes, tensors, strict=True)
        return function(*(torch.empty(size, dtype=tensor.dtype, device=tensor.device) for size, tensor in pairs))


def _mode_of(stand_in: Tensor) -> FakeTensorMode:
    assert isinstance(stand_in, FakeTensor)
    return stand_in.fake_mode


@tracing()
def trace(function: Callable[..., Tensor | Sequence[Tensor]], tensors: Sequence[Tensor]) -> fx.Graph:
    """Return the aten graph of `function`, before autograd decomposes anything, with one placeholder per tensor.

    Each node has the lines of the methods called `forward` that computed it as its `stack_trace`.
    """
    # Those who call for this trace are no part of it, such as an adapted model in its own `forward`.
    outer = {f'File "{frame.f_code.co_filename}", line {line}' for frame, line in traceback.walk_stack(None)}
    mode = _mode_of(tensors[0])
    if mode.shape_env is not None:  # sizes of other operations that depend on values, which make_fx would miss here
        mode.shape_env.pending_fresh_unbacked_symbols.clear()
    # make_fx is the tracer of torch.export. Nothing public records `aten.linear` and keeps `detach`.
    with mode, keeping_functions() as kept:
        gm = make_fx(function, pre_dispatch=True, record_stack_traces=True)(*tensors)
        kept.put_calls(gm)
    _inline_numbers(gm)
    for node in gm.graph.nodes:
        frames = re.findall(r'(File "[^"]*", line \d+), in forward(\n.*)', node.stack_trace or "")
        lines = [f"{place}, in forward{code}" for place, code in frames if place not in outer]
        node.stack_trace = "\n  ".join(lines) or None
    return gm.graph


def _inline_numbers(gm: fx.GraphModule) -> None:
    """Let the graph make the tensors that were numbers in the traced function (`torch.tensor(0.5)`, `t[0] = 1`).

    The tracer keeps them as tensors of the module, which a graph that gets a copy of the nodes does not have.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if not isinstance(value, Tensor) or value.dim():
            continue
        with gm.graph.inserting_before(node):
            layout: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            number = gm.graph.call_function(torch.ops.aten.scalar_tensor.default, (value.item(),), layout)
        number.meta["val"] = node.meta["val"]
        copies = [node]
        for copy in copies:  # each is a copy of the number, or that copy detached
            copies += [user for user in copy.users if user.target in _COPIES]
            copy.replace_all_uses_with(number, delete_user_cb=lambda user: user.target not in _COPIES)
        for copy in reversed(copies):
            gm.graph.erase_node(copy)
