"""Run a model and compare results: outputs, and gradients of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_lite_fx as llfx

_TOLERANCE = 2e-4

Results = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The outputs of a model by their path, and the gradients of its adapters by name."""


class Unequal(Exception):
    """A graph computes something else than the wrapper."""


class NotApplicable(Exception):
    """A step makes no sense for a model."""


def outputs_of(call: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the result of a call by their path."""
    torch.manual_seed(7)
    result = call(**inputs)
    if type(result).__module__.startswith("diffusers."):  # whose outputs have no paths
        result = result.to_tuple()
    paths, _ = pytree.tree_flatten_with_path(result)
    return {pytree.keystr(path): value for path, value in paths if isinstance(value, Tensor)}


def differentiate(outputs: dict[str, Tensor]) -> None:
    """Compute the gradients of a sum of all outputs with different weights, if they have any."""
    floats = [value for value in outputs.values() if value.is_floating_point() and value.requires_grad]
    if floats:
        total = sum((value.float() * torch.arange(value.numel()).cos().view(value.shape)).sum() for value in floats)
        assert isinstance(total, Tensor)
        total.backward()


def run(model: nn.Module, inputs: dict[str, Any], training: bool, call: Any = None) -> Results:
    """Return the results of a model, called as itself or by `call`."""
    model.train(training)
    model.zero_grad()
    outputs = outputs_of(model if call is None else call, inputs)
    differentiate(outputs)
    names = llfx.adapter_state_dict(model)
    gradients = {n: p.grad for n, p in zip(names, llfx.adapter_parameters(model), strict=False) if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def run_nudged(model: nn.Module, inputs: dict[str, Any], training: bool, call: Any = None) -> Results:
    """Return the results with the last bits of the adapters changed."""
    state = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(model).items()}
    signs = torch.Generator().manual_seed(5)
    changed = {
        name: tensor * (1 + 2.0**-22 * (torch.rand(tensor.shape, generator=signs) - 0.5).sign())
        for name, tensor in state.items()
    }
    llfx.load_adapter_state_dict(model, changed)
    try:
        return run(model, inputs, training, call)
    finally:
        llfx.load_adapter_state_dict(model, state)


def require_equal(expected: Results, actual: Results, where: str, nudged: Callable[[], Results] | None = None) -> None:
    """Raise `Unequal` if results are further apart than rounding, and than ten times what changed last bits make."""
    if not actual[0]:
        raise Unequal(f"{where}: no outputs")
    others: Results | None = None
    gradients = [float(value.abs().max()) for value in expected[1].values()]
    for index, what in enumerate(("", "gradient of ")):
        scale = max(gradients, default=0.0) if index else 0.0
        for name in actual[0] if index == 0 else expected[1]:
            theirs, ours = expected[index].get(name), actual[index].get(name)
            away = distance(theirs, ours, scale)
            if away > _TOLERANCE and nudged is not None:
                others = others or nudged()
                away /= max(1.0, 10 * distance(theirs, others[index].get(name), scale) / _TOLERANCE)
            if away > _TOLERANCE:
                raise Unequal(f"{where}: {what}{name} is {away:.2g} away")


def distance(theirs: Tensor | None, ours: Tensor | None, scale: float) -> float:
    """Return the largest difference relative to the largest value, or to `scale`; infinite if they do not compare."""
    if theirs is None or ours is None or theirs.shape != ours.shape:
        return float("inf")
    theirs, ours = theirs.double(), ours.double()
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    theirs, ours = theirs[finite], ours[finite]
    return float((theirs - ours).abs().max()) / max(float(theirs.abs().max()), scale, 1e-12)
