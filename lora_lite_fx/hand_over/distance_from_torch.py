"""How far what a runtime computes is from what torch does, and how far that may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..capture.differences import distance, largest
from ..compat.torch import pytree

_SMALL = 1e-3
_ALLOWED = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ALLOWED_OF_OTHERS = 1e-3


def difference(results: Any, expected: Any) -> float:
    """Return the largest difference of tensors, relative to the largest number of each that is expected.

    Numbers below 0.001 count as 0.001. Another number of tensors, other shapes, and values that are NaN or infinite in
    one of the two alone are infinitely far.
    """
    found, wanted = pytree.tree_leaves(results), pytree.tree_leaves(expected)
    return max(map(_difference, found, wanted), default=0.0) if len(found) == len(wanted) else float("inf")


def allowed(expected: Any) -> float:
    """Return how far results may be: rounding, which runtimes do elsewhere, and no other computation."""
    dtypes = [torch.as_tensor(value).dtype for value in pytree.tree_leaves(expected)]
    return max((_ALLOWED.get(dtype, _ALLOWED_OF_OTHERS) for dtype in dtypes), default=0.0)


def _difference(result: Tensor, expected: Tensor) -> float:
    result, expected = (torch.as_tensor(value).detach().cpu().double() for value in (result, expected))
    return distance(result, expected) / max(largest(expected), _SMALL)
