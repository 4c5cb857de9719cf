"""Count the bytes that are saved for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(call: Callable[[], Any], beside: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd saves while `call` runs: each storage once, without those of tensors `beside`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in beside}
    kept: dict[int, Tensor] = {}  # so that no other takes its place

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)


def saved_by(model: nn.Module, inputs: Any) -> int:
    """Return the bytes that a forward pass saves; without parameters, buffers and inputs, which exist anyway.

    Args:
        model: to run.
        inputs: its arguments, a tuple or by name.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return saved_bytes(lambda: model(*args, **kwargs), (*model.parameters(), *model.buffers(), *tensors))
