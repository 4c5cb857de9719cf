"""Let `module.to(dtype)` return the module as it is if it has that dtype already.

`self.classifier.to(torch.float32)` sets each parameter anew, also where nothing changes, and a trace refuses that.

Needed by Switch Transformers and NLLB-MoE, whose routers convert their classifier in each call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .quirk import Call, Quirk, after_failure


@contextmanager
def needless_conversions_left_out(model: nn.Module, call: Call) -> Iterator[None]:
    """Give the modules of `model`, a copy of the user's, a `to` of their own in the body."""
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


QUIRK = Quirk(after_failure, needless_conversions_left_out)
