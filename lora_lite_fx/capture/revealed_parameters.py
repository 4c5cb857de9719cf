"""Give parameters that hide what a model computes other values, while it is compared.

A gate that starts at zero, as the last layer of a condition, makes whatever stands before it the same. So a comparison
at the start would find that a condition may be left out, and training would make it wrong. What a model computes of its
parameters does not depend on their values, so it is compared with values that show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..graph.tensors import has_values

_SMALL = 1e-3
"""The largest value of a parameter that hides something. The scales of layers start at 1e-4 or less."""


@contextmanager
def revealed_parameters(*models: nn.Module) -> Iterator[None]:
    """Give parameters that are near zero other values for the body; those over the same storage get the same.

    Args:
        models: a model, and graphs of it. They have parameters of their own, which may share storage with a user's.
    """
    hidden: list[tuple[nn.Parameter, Tensor]] = []
    values: dict[tuple[int, torch.Size], Tensor] = {}
    try:
        for parameter in (parameter for model in models for parameter in model.parameters()):
            if _hides(parameter):
                key = parameter.data_ptr(), parameter.shape
                values.setdefault(key, _drawn(parameter, len(values)))
                hidden.append((parameter, parameter.data))
                parameter.data = values[key]
        yield
    finally:
        for parameter, data in hidden:
            parameter.data = data


def _hides(parameter: nn.Parameter) -> bool:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or not has_values(parameter):
        return False
    value = parameter.detach()
    if not value.numel() or value[(0,) * value.dim()].abs() >= _SMALL:  # the usual case, without a look at the others
        return False
    return bool((value.abs() < _SMALL).all())


def _drawn(parameter: Tensor, seed: int) -> Tensor:
    """Return values for a parameter that let what it scales count as much as what stands beside it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(parameter.shape, generator=generator) / 2 + 0.5
    inputs = parameter[0].numel() if parameter.dim() > 1 else 1
    return torch.empty_like(parameter.detach()).copy_(drawn / inputs**0.5)
