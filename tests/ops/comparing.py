"""An operation beside the plain ones that it stands for: values, gradients, and what autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor


def assert_same(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], values: list[Tensor], needed: Set[int]
) -> None:
    """Check results and gradients, where the values of these numbers need one; and results without gradients."""
    for number, value in enumerate(values):
        value.requires_grad_(number in needed)
    result, expected = function(*values), plain(*values)
    torch.testing.assert_close(result, expected)
    trained = [values[number] for number in sorted(needed)]
    gradient = torch.randn_like(result)
    ours, theirs = (torch.autograd.grad(each, trained, gradient) for each in (result, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(function(*values), expected)


def saved_bytes(function: Callable[..., Any], *values: Tensor) -> int:
    """Return the bytes of memory that autograd saves in a call."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*values)
    assert result.requires_grad
    return sum(saved.values())
