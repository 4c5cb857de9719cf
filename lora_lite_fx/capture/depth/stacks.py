"""Stacks of layers: the containers of a model whose members may be layers, and the model with fewer of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ...compat.torch_modules import children_of

_FEWEST = 4
"""The number of layers from which on some can be left out: one before the repetition, and two that show it."""


def stacks_of(model: nn.Module) -> dict[str, int]:
    """Return the containers of modules that may be layers, with their sizes; the outermost first."""
    found: dict[str, int] = {}
    owners: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners[id(module)] = owners.get(id(module), 0) + 1
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name and len(module) >= _FEWEST:
            found[name] = len(module)

    def is_once(name: str) -> bool:
        return all(owners[id(layer)] == 1 for layer in model.get_submodule(name).children())

    return {name: size for name, size in found.items() if is_once(name)}


def built_alike(model: nn.Module) -> dict[str, int]:
    """Return those of the stacks whose layers have modules of the same classes and tensors of the same sizes."""

    def built(layer: nn.Module) -> object:
        modules = [(name, type(module)) for name, module in layer.named_modules()]
        return modules, [(name, tensor.shape) for name, tensor in layer.state_dict(keep_vars=True).items()]

    found = {}
    for name, size in stacks_of(model).items():
        first, *others = map(built, model.get_submodule(name).children())
        if all(other == first for other in others):
            found[name] = size
    return found


@contextmanager
def shortened(model: nn.Module, lengths: Mapping[str, int]) -> Iterator[None]:
    """Leave layers out of `model`: keep the first ones of each stack.

    Args:
        model: is as before afterwards.
        lengths: how many layers to keep, by the name of the stack.
    """
    stacks = [(model.get_submodule(name), length) for name, length in lengths.items()]
    all_layers = [dict(children_of(stack)) for stack, _ in stacks]
    try:
        for stack, length in stacks:
            for name in list(children_of(stack))[length:]:
                del children_of(stack)[name]
        yield
    finally:
        for (stack, _), layers in zip(stacks, all_layers, strict=True):
            children_of(stack).clear()
            children_of(stack).update(layers)
