"""Make arguments that say how images lie a part of the graph.

Such an argument is the grid of an image's patches, or its size. A model reads its numbers in Python: it splits lists by
them, and loops over rows. A graph cannot follow other numbers, so it holds for those of the example. They are known
while the graph is made, and so is all that is computed of them alone. A call passes the same values, or is refused.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compat.torch import disable_current_modes, pytree
from .forward_signature import forward_signature, give_signature

_LAYOUT = re.compile(r"(^|_)(grids?(_thw|_hw)?|image_sizes(_videos)?|target_sizes(_videos)?|spatial_shapes)$")
# The functions of transformers that compute indices from layouts, which create tensors of sizes that they read.
_HELPERS = "transformers.vision_utils"


def layouts_in(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return those of the arguments of a call that are layouts."""
    return {
        name: value
        for name, value in inputs.items()
        if _LAYOUT.search(name) and isinstance(value, Tensor) and not value.is_floating_point()
    }


def pass_layouts(model: nn.Module, layouts: Mapping[str, Tensor]) -> None:
    """Let `model` get these arguments in every call that does not have them; for a copy of the user's model."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**{name: value.clone() for name, value in layouts.items()}, **kwargs}

    model.register_forward_pre_hook(add, with_kwargs=True)
    _leave_optional(model, layouts)


def _leave_optional(model: nn.Module, layouts: Mapping[str, Tensor]) -> None:
    """Let `model`, a copy of the user's, be called without these arguments if its forward requires any."""
    parameters = forward_signature(type(model)).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if not layouts.keys() & required:
        return

    def optional(parameter: inspect.Parameter) -> inspect.Parameter:
        is_layout = parameter.name in layouts
        return parameter.replace(kind=parameter.KEYWORD_ONLY, default=None) if is_layout else parameter

    ordered = sorted(map(optional, parameters), key=lambda parameter: parameter.kind)
    give_signature(model, inspect.Signature(ordered))


@contextmanager
def known_while_traced(model: nn.Module) -> Iterator[None]:
    """Compute outside of a trace what depends on nothing that is traced."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    helpers = [
        (vars(module), name, value)
        for module in modules
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == _HELPERS and callable(value)
    ]
    with ExitStack() as stack:
        for namespace, name, helper in helpers:
            stack.enter_context(mock.patch.dict(namespace, {name: _computed_outside(helper)}))
        stack.enter_context(_Known())
        yield


class _Known(TorchFunctionMode):
    """Runs each function of tensors outside of the trace if it knows the values of all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _are_known(args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        with disable_current_modes():
            return func(*args, **(kwargs or {}))


def _computed_outside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        # Some take the model's own keyword arguments too, from which they take what was computed before.
        if not _are_known(args, {name: value for name, value in kwargs.items() if name != "kwargs"}):
            return function(*args, **kwargs)
        with disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return outside


def _are_known(args: Any, kwargs: Any) -> bool:
    """Tell whether tensors are among the arguments, and all have values. Those of a trace have types of its own."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(type(tensor) is Tensor for tensor in tensors)
