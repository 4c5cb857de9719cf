"""Check that a user's model does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all of `model` that a user could notice: modules, modes, hooks, flags, and tensors bit for bit."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        registered = {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)}
        seen[f"module {path}"] = (type(module), id(module), plain, registered)
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        seen[f"tensor {name}"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.requires_grad,
            _bits(tensor),
            _bits(tensor.grad),
        )
    if (config := getattr(model, "config", None)) is not None:
        seen["config"] = repr(config)
    return seen


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Assert that the body, also where it raises, changes nothing of `models`."""
    before = [snapshot(model) for model in models]
    try:
        yield
    finally:
        for model, was in zip(models, before, strict=True):
            now = snapshot(model)
            assert now.keys() == was.keys(), sorted(now.keys() ^ was.keys())
            changed = [what for what in was if now[what] != was[what]]
            assert not changed, changed
