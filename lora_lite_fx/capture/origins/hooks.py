"""Hooks that stand on a model when it is captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...compat.accelerate import offloading_hook_of
from ...compat.torch_modules import BACKWARD_HOOKS, FORWARD_HOOKS, FORWARD_PRE_HOOKS, HOOKS_WITH_KEYWORDS, hooks_of
from ...errors import CaptureError
from ...storage.storages import STORAGES


def hooks_on(module: nn.Module, kinds: tuple[str, ...]) -> list[Any]:
    """Return the hooks of these kinds that the user put on `module`.

    Those that belong to the model are left out: those by which `torch.nn.utils` computes weights (pruning, spectral
    norm), and those by which transformers collects hidden states, which a first call installs for good. Capture traces
    them, and so they are part of the graph. The hook of compressed-tensors is left out, too, see `storage`.
    """
    return [hook for kind in kinds for hook in hooks_of(module, kind).values() if not _belongs_to_model(hook)]


_WITH_KEYWORDS = tuple(zip(FORWARD_HOOKS, HOOKS_WITH_KEYWORDS, strict=True))


def hooks_with_keywords_on(module: nn.Module) -> list[Any]:
    """Return the hooks that the user put on `module` and that get the keyword arguments of its calls."""
    found = [hooks_of(module, kind)[key] for kind, those in _WITH_KEYWORDS for key in hooks_of(module, those)]
    return [hook for hook in found if not (_belongs_to_model(hook) or _is_of(hook, "torch."))]  # fully_shard has one


def weight_hooks_on(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks by which `torch.nn.utils` computes weights of `module` before each of its calls."""
    return tuple(hook for hook in hooks_of(module, FORWARD_PRE_HOOKS).values() if _is_of(hook, _OF_WEIGHTS))


def take_hooks_off(model: nn.Module) -> None:
    """Remove the user's hooks from all modules of `model`, which is a copy of the user's model."""
    for module in model.modules():
        for kind in (*FORWARD_HOOKS, *BACKWARD_HOOKS):
            registry = hooks_of(module, kind)
            for key in [key for key, hook in registry.items() if not _belongs_to_model(hook)]:
                del registry[key]


def check_hooks(model: nn.Module) -> None:
    """Warn of the hooks on `model` that act otherwise in its graph, naming module and hook.

    Raises:
        CaptureError: as `refuse_offloading`.
    """
    refuse_offloading(model)
    for name, hook in _hooks(model, FORWARD_HOOKS):
        warnings.warn(
            f"A hook on {_place(name, model)} was traced: {hook_name(hook)}. What it computes of tensors is part of the"
            " graph for good; what else it does happens only now. The way out: take it off before, and put it on the"
            " graph's own layer, graph.model.layers[0], where it acts in each call.",
            stacklevel=4,
        )
    for name, hook in _hooks(model, BACKWARD_HOOKS):
        warnings.warn(
            f"A backward hook on {_place(name, model)} does not act in the graph: {hook_name(hook)}. The way out: put"
            " it on the graph's own layer, graph.model.layers[0].",
            stacklevel=4,
        )


def refuse_offloading(model: nn.Module) -> None:
    """Raise CaptureError if hooks of accelerate move the weights or inputs of `model` about."""
    for name, module in model.named_modules():
        if (hook := offloading_hook_of(module)) is not None:
            raise CaptureError(
                f"A hook of accelerate stands on {_place(name, model)} ({type(hook).__name__}): it moves"
                " weights or inputs in each call, which a graph does not. The way out:"
                " accelerate.hooks.remove_hook_from_module(model, recurse=True) before, on a model whose weights are on"
                " one device."
            )


def hook_name(hook: Any) -> str:
    """Return the name of a hook, or of its class."""
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _hooks(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for hook in hooks_on(module, kinds):
            yield name, hook


def _place(name: str, model: nn.Module) -> str:
    return repr(name) if name else f"the model, a {type(model).__name__}"


def _belongs_to_model(hook: Any) -> bool:
    return _is_of(hook, *_OF_MODELS) or any(_is_of(hook, *each.packages) for each in STORAGES if each.hook)


def _is_of(hook: Any, *packages: str) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(packages)


_OF_WEIGHTS = "torch.nn.utils"
_OF_MODELS = (_OF_WEIGHTS, "transformers.utils.output_capturing")
