"""Let models do in their forward what changes nothing and raises in a trace.

`self.classifier.to(torch.float32)` sets each parameter anew also where it is float32 already, and
`torch.randn(x.shape, generator=None)` is another operator than without the argument, which takes no sizes of a trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def needless_conversions_left_out() -> Iterator[None]:
    """Let `module.to(dtype)` in the body return the module as it is where it has that dtype already.

    Safe for other threads, because such a call changes nothing at any time.
    """
    convert = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtype = args[0] if len(args) == 1 and not kwargs else None
        tensors = [*self.parameters(), *self.buffers()]
        if isinstance(dtype, torch.dtype) and all(
            tensor.dtype == dtype or not tensor.is_floating_point() for tensor in tensors
        ):
            return self
        return convert(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = convert  # type: ignore[method-assign]


class WithoutGeneratorOfNone(TorchFunctionMode):
    """Leaves out `generator=None`, which asks for the generator that is taken anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator", self) is None:
            del kwargs["generator"]
        return func(*args, **kwargs)
