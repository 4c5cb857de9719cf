"""Run models and compare what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.state import adapter_state_dict, load_adapter_state_dict
from ..compat.torch_modules import HOOKS, hooks_of

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far results of two programs may be apart, as a multiple of the largest value."""


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a multiple of the largest value, or of 1 if that is larger."""
    return (actual - expected).abs().max().item() / expected.abs().max().clamp_min(1).item()


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Assert that two tensors are equal in shape, dtype and, relative to the largest value, in value.

    Returns:
        How far they are apart.

    Raises:
        AssertionError: they are not equal; the message says what is wrong with `what`, and by how much.
    """
    shape = tuple(expected.shape)
    assert actual.shape == shape, f"{what} has shape {tuple(actual.shape)} instead of {shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    if torch.isfinite(expected).all():
        bad = int((~torch.isfinite(actual)).sum())
        assert not bad, f"{what}: {bad} of {actual.numel()} values are NaN or infinite"
    error = distance(actual, expected)
    assert error <= tolerance, f"{what}: off by {error:.2e} of the largest value at {shape}, allowed {tolerance:.0e}"
    return error


def output(model: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> Tensor:
    """Return the output of a model, or its logits, with random numbers that start from `seed`."""
    torch.manual_seed(seed)
    result = model(*args)
    return result if isinstance(result, Tensor) else result.logits


def gradients(model: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradient of a fixed random functional of it, for every parameter that has one."""
    model.zero_grad()
    y = output(model, args)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if y.requires_grad:
        (y * direction.to(y.dtype)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def perturb(model: nn.Module, seed: int) -> None:
    """Move every adapter tensor away from its start, frozen ones included, because a start of zeros hides too much."""
    generator = torch.Generator().manual_seed(seed)
    state = adapter_state_dict(model)
    moved = {
        name: (tensor + 0.25 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + 0.1).to(tensor)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    load_adapter_state_dict(model, {**state, **moved})


@contextmanager
def restored(*models: nn.Module) -> Iterator[None]:
    """Put buffers, such as the statistics of batch norm, and adapters back to what they were."""
    tensors = [tensor for model in models for tensor in (*adapter_state_dict(model).values(), *model.buffers())]
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, was in zip(tensors, before, strict=True):
        tensor.detach().copy_(was)


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Change the last bit of the adapters for a while."""
    with restored(model):
        for tensor in adapter_state_dict(model).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.nextafter(tensor, tensor.new_tensor(math.inf)))
        yield


def observe(model: nn.Module) -> dict[str, Any]:
    """Return what is observable of a model apart from values: modules, modes, hooks, flags, storage, gradients."""
    seen: dict[str, Any] = {
        f"module {name}": (type(module), module.training, [list(hooks_of(module, registry)) for registry in HOOKS])
        for name, module in model.named_modules()
    }
    return seen | {
        f"parameter {name}": (p.requires_grad, p.data_ptr(), p.grad is None)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that a tensor consists of: itself, or those that a quantized one wraps."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def snapshot(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `observe` sees of a model, and copies of its tensors."""
    return observe(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def difference(
    before: tuple[dict[str, Any], dict[str, Tensor]], after: tuple[dict[str, Any], dict[str, Tensor]]
) -> str:
    """Say what differs between two snapshots of a model; empty if nothing does."""
    (seen, tensors), (seen_now, tensors_now) = before, after
    for what in {**seen, **seen_now}:
        if seen.get(what) != seen_now.get(what):
            return f"{what} has other modes, hooks, flags, storage or gradients than before"
    pairs = [
        (name, *pair)
        for name, tensor in tensors.items()
        for pair in zip(parts_of(tensor), parts_of(tensors_now[name]), strict=True)
    ]
    for name, tensor, now in pairs:
        if not torch.equal(tensor, now):
            off = (tensor.double() - now.double()).abs().max().item()
            return f"{name} {tuple(tensor.shape)} has other values than before, by up to {off:.2e}"
    return ""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that nothing observable of `model` changes: values, storage, flags, modes, hooks, gradients."""
    before = snapshot(model)
    yield
    changes = difference(before, snapshot(model))
    assert not changes, changes
