"""Make arguments that say how images lie a part of the graph.

Such an argument is the grid of an image's patches, or its size. A model reads its numbers in Python: it splits lists by
them, and loops over rows. A graph cannot follow other numbers, so it holds for those of the example. They are known
while the graph is made, and so is all that is computed of them alone. A call passes the same values, or is refused.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...compat.torch import disable_current_modes, pytree
from ..forward_signature import forward_signature, give_signature

_LAYOUT = re.compile(r"(^|_)(grids?(_thw|_hw)?|(image|target)_sizes(_videos)?|spatial_shapes|merge_sizes)$")
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


class KnownWhileTraced(TorchFunctionMode):
    """Computes outside of a trace what depends on known tensors alone, and what helpers of transformers make of sizes.

    The helpers compute indices from layouts, of tensors that they make of the numbers in them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors:
            is_known = all(type(tensor) is Tensor for tensor in tensors)  # those of a trace have types of its own
        else:
            is_known = _is_of_helpers() and not any(isinstance(leaf, torch.SymInt) for leaf in leaves)
        if not is_known:
            return func(*args, **(kwargs or {}))
        with disable_current_modes():
            return func(*args, **(kwargs or {}))


def _is_of_helpers() -> bool:
    """Tell whether one of the helpers called the function of torch that a mode is asked for."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # of the modes inside this one
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == _HELPERS
