"""Hold the private names of `torch.nn.Module`: its registries, and how tensors are put in the place of its own.

The registries have no public names; what is public copies them or leaves out what is None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .names import needed

_MODULE = "torch.nn.Module()"
needed(f"{_MODULE}._modules", "nn.Module.named_children: leaves out what is None, and children that occur twice")
needed(f"{_MODULE}._parameters", "nn.Module.named_parameters: leaves out what is None, and walks all modules")
needed(f"{_MODULE}._buffers", "nn.Module.named_buffers: leaves out what is None, and walks all modules")
for _registry in (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
):
    needed(f"{_MODULE}.{_registry}", "nn.Module.register_forward_hook and the like: nothing lists what was registered")

MODULES = "_modules"
"""The attribute of a module that holds its registry of children."""
REGISTRIES = ("_parameters", "_buffers", MODULES)
"""The attributes of a module that hold what it has by name, in the order in which Python looks a name up."""
FORWARD_PRE_HOOKS = "_forward_pre_hooks"
"""The attribute of a module that holds the hooks before its calls."""
FORWARD_HOOKS = (FORWARD_PRE_HOOKS, "_forward_hooks")
BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
HOOKS = (*FORWARD_HOOKS, *BACKWARD_HOOKS, "_state_dict_hooks")
"""The attributes of a module that hold its hooks."""
HOOKS_WITH_KEYWORDS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
"""The attributes of a module that hold which hooks get keyword arguments."""


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the registry of the children of `module`, itself and not a copy."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the registry of the parameters of `module`, itself and not a copy."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the registry of the buffers of `module`, itself and not a copy."""
    return module._buffers


def hooks_of(module: nn.Module, registry: str) -> dict[int, Any]:
    """Return a registry of hooks of `module`, itself and not a copy."""
    hooks: dict[int, Any] = getattr(module, registry)
    return hooks


needed(
    f"{_MODULE}._non_persistent_buffers_set",
    "nn.Module.state_dict: has the persistent ones, of modules whose state_dict is not their own",
)
needed("torch.nn.Module._apply", "nn.Module.to_empty: gives memory to all tensors, also to those with values")


def is_persistent(module: nn.Module, name: str) -> bool:
    """Tell whether a buffer of `module` is saved with it."""
    return name not in module._non_persistent_buffers_set


def change_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put what `change` returns in the place of each tensor of `module`, in a way that wrappers of modules follow."""
    module._apply(change)


class SeesMoves:
    """Make a module, of a class after this one, be asked before its tensors are moved or cast."""

    def move(self, fn: Callable[..., Any], apply: Callable[[], object]) -> None:
        """Do what `to`, `half`, `cuda` and the like do.

        Args:
            fn: is applied to each tensor.
            apply: does so; call it once.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.move(fn, functools.partial(super()._apply, fn, recurse))  # type: ignore[misc]
        return self
