"""Trace a function on stand-ins without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def fake_input(node: fx.Node, example: Tensor | None = None, fixed: Sequence[int] = ()) -> Tensor:
    """A stand-in without data for the value of `node`.

    A symbolically traced graph knows no shapes; there it is one of `example`, whose dimensions may be of any size but
    for the `fixed` ones.
    """
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value
    assert example is not None
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        [DimDynamic.STATIC if dim in fixed else DimDynamic.DYNAMIC for dim in range(example.dim())]
    )
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(example.detach(), symbolic_context=dynamic)


def fake_like(tensor: Tensor, beside: Tensor) -> Tensor:
    """A stand-in for `tensor` that can be used with the stand-in `beside`."""
    return _mode_of(beside).from_tensor(tensor.detach(), static_shapes=True)


def _mode_of(stand_in: Tensor) -> FakeTensorMode:
    assert isinstance(stand_in, FakeTensor)
    return stand_in.fake_mode


def trace(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> fx.Graph:
    """The aten graph of `function` on stand-ins, before autograd decomposes anything; one placeholder per tensor."""
    # make_fx is what torch.export itself traces with; nothing public records `aten.linear` and keeps `detach`.
    with _mode_of(tensors[0]):
        return make_fx(function, pre_dispatch=True)(*tensors).graph
