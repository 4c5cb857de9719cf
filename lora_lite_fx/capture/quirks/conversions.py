"""Let models do in their forward what changes nothing and raises in a trace, or is left out otherwise than in one.

`self.classifier.to(torch.float32)` sets each parameter anew also where it is float32 already, and
`torch.randn(x.shape, generator=None)` is another operator than without the argument, which takes no sizes of a trace.
`x.data` is a tensor that a trace does not follow, and a deep copy of a tensor without data may end the process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from ...compat.torch import validates_arguments


@contextmanager
def needless_conversions_left_out(model: nn.Module) -> Iterator[None]:
    """Let `module.to(dtype)` in the body return a module of `model` as it is where it has that dtype already.

    Args:
        model: a copy of the user's model, whose modules get a `to` of their own for a while.
    """
    modules = [module for module in model.modules() if "to" not in vars(module)]
    for module in modules:
        vars(module)["to"] = functools.partial(_to, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["to"]


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    dtype = args[0] if len(args) == 1 and not kwargs else None
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(dtype, torch.dtype) and all(
        tensor.dtype == dtype or not tensor.is_floating_point() for tensor in tensors
    ):
        return module
    return type(module).to(module, *args, **kwargs)


@contextmanager
def needless_checks_left_out() -> Iterator[None]:
    """Let distributions in the body not check the values of their parameters, which a trace does not have.

    torch.compile leaves them out for good. Safe because they change nothing: the model, with which a graph is compared,
    makes them.
    """
    before = validates_arguments()
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


class DataFollowed(TorchFunctionMode):
    """Reads `x.detach()` for `x.data`, of which a trace knows no origin and no writes.

    CogVideoX fills a part of a table by `table.data[:, 6:].copy_(positions)`. Safe because both have the storage of `x`
    and no gradient; they differ in what autograd notices of writes, and a graph has these as operators.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **kwargs or {})


class CopiesFollowed(TorchFunctionMode):
    """Clones tensors in a deep copy, which Dory makes of layers of its cache.

    torch copies the storage of a tensor without data, which has none: that raises, or spoils the memory of the process.
    A clone is what torch itself makes of tensors that have no storage. A parameter stays the copy that torch makes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or isinstance(args[0], nn.Parameter):
            return func(*args, **kwargs or {})
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone()
        return memo[id(tensor)]


class WithoutGeneratorOfNone(TorchFunctionMode):
    """Leaves out `generator=None`, which asks for the generator that is taken anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator", self) is None:
            del kwargs["generator"]
        return func(*args, **kwargs)
