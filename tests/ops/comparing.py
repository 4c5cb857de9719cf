"""An operation beside the plain ones that it stands for: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Set

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
