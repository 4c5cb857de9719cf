"""Try the way of `backend(cfg).adapt` and `torch.compile`, for models that cannot be captured as one graph."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from tests.support.conformance import randomise

from .calls import calls_of
from .comparing import NotApplicable, Unequal, differentiate, outputs_of, require_equal, run, run_nudged
from .tried import Tried

_ALPHA = 2
_MOST_EXCLUDED = 12
_RECOMPILATIONS = 64


def compare_by_backend(tried: Tried, report: Callable[..., None]) -> None:
    """Compare the compiled model that carries adapters with a copy whose linears add theirs, in both modes.

    Args:
        tried: has the model, which is frozen, and whose buffers change as its calls change them.
        report: takes `backend_graphs`, the number of graphs, and `backend_excluded`, the linears that are refused.

    Raises:
        Unequal: outputs or gradients differ.
        NotApplicable: torch.compile raises of the model as it is.
    """
    model = tried.model.requires_grad_(False)
    calls = calls_of(model, tried.given)[:2]
    adapting, carrier, excluded = _adapted(model, calls[0][1])
    if excluded:
        report(backend_excluded=excluded)
    randomise(carrier, 0)
    reference = _with_adapters(model, carrier)
    torch._dynamo.utils.counters.clear()
    # As the error of the backend says: what all modules call, such as a decorator, is compiled once for each of them.
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    compiled: Any = torch.compile(carrier, backend=adapting)
    compared = []
    for what, inputs in calls:
        for training in (True, False) if what == "example" else (False,):
            where = f"{what}, {'training' if training else 'evaluation'}"
            carrier.train(training)
            reference.train(training)
            _copy_buffers(carrier, reference)
            try:
                expected = run(carrier, inputs, training, reference)
            except Exception as error:  # the model itself does not take this
                report(**{f"not_tried ({where})": f"{type(error).__name__}: {str(error)[:100]}"})
                continue
            try:
                actual = run(carrier, inputs, training, compiled)
            except llfx.AdapterError:
                raise
            except Exception as error:
                require_compiles(model, inputs, training, "eager")
                raise error
            nudged = partial(run_nudged, carrier, inputs, training, reference)
            try:
                require_equal(expected, actual, where, nudged)
            except Unequal as error:
                _require_same_compiled(model, inputs, error)
                raise
            compared.append(where)
    if not compared:
        raise NotApplicable("the model itself takes none of the calls")
    report(backend_graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _adapted(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, nn.Module, list[str]]:
    """Return a backend with adapters at all linears that it can adapt, the model that has these, and other linears."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    excluded: list[str] = []
    while True:
        pattern = "^(" + "|".join(re.escape(name) for name in names if name not in excluded) + ")$"
        adapted = llfx.backend(llfx.LoRA(r=1, alpha=_ALPHA, target_names=pattern), inner="eager")
        try:
            carrier = adapted.adapt(model, **inputs)
        except llfx.ConfigError as error:
            found = [name for name in names if f"'{name}'" in str(error) and name not in excluded]
            if not found or len(excluded) > _MOST_EXCLUDED:
                raise
        else:  # those that run on constants alone are no sites
            sites = {name.rpartition(".")[0] for name in llfx.adapter_state_dict(carrier)}
            found = [name for name in names if name not in sites and name not in excluded]
            if not found:
                return adapted, carrier, excluded
        excluded += found


def _with_adapters(model: nn.Module, carrier: nn.Module) -> nn.Module:
    """Return a copy of the model whose linears add alpha B A x, of the adapters of `carrier`."""
    reference = copy.deepcopy(model)
    parameters = dict(carrier.named_parameters())
    for name in llfx.adapter_state_dict(carrier):
        path, _, kind = name.rpartition(".")
        if kind == "lora_A":
            down, up = parameters[name], parameters[f"{path}.lora_B"]
            reference.get_submodule(path).register_forward_hook(partial(_add, down, up))
    return reference


def _add(down: Tensor, up: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + _ALPHA * (args[0] @ down.T) @ up.T


def _copy_buffers(model: nn.Module, other: nn.Module) -> None:
    for buffer, its in zip(model.buffers(), other.buffers(), strict=True):
        its.copy_(buffer)


def _require_same_compiled(model: nn.Module, inputs: dict[str, Any], error: Unequal) -> None:
    """Raise NotApplicable if torch.compile changes what the model computes without adapters."""
    torch._dynamo.reset()
    with torch.no_grad():
        plain, compiled = outputs_of(model, inputs), outputs_of(torch.compile(model, backend="eager"), inputs)
    try:
        require_equal((plain, {}), (compiled, {}), "as it is")
    except Unequal as other:
        raise NotApplicable(f"torch.compile changes what it computes without adapters: {other}") from error


def require_compiles(model: nn.Module, inputs: dict[str, Any], training: bool, backend: str) -> None:
    """Raise NotApplicable if the model itself cannot be compiled, with gradients of its parameters."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.train(training).requires_grad_(), backend=backend)
    try:
        differentiate(outputs_of(compiled, inputs))
    except Exception as error:
        raise NotApplicable(f"torch.compile of it raises {type(error).__name__}: {str(error)[:100]}") from None
