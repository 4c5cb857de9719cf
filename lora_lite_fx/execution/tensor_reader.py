"""Read the tensors of a module fast, at every call: what was replaced since the last call is seen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import fx, nn

from ..compat.torch_modules import MODULES, REGISTRIES
from ..errors import AdapterError
from ..graph.subgraph import function_of

Paths = tuple[tuple[str, ...], ...]
"""The parts of qualified names."""


@dataclass(frozen=True)
class Reader:
    """Reads tensors and submodules of a module. Readers of equal modules are equal.

    An attribute of an attribute of a module costs several microseconds, and each call of a model reads every tensor. So
    it takes them from the registries of modules, and visits each module on the way once. It falls back to attributes
    where a registry does not have the name any more, as after `torch.nn.utils.parametrize`.

    Args:
        paths: the parts of the qualified names.
        registered: `None, module -> values`, from the registries.
    """

    paths: Paths
    registered: Callable[..., tuple[Any, ...]]

    def __call__(self, module: nn.Module) -> tuple[Any, ...]:
        """Return what `module` has under these names now.

        Raises:
            AdapterError: it lacks one of them.
        """
        try:
            return self.registered(None, module)
        except KeyError:
            return tuple(_attribute(module, path) for path in self.paths)


@dataclass(frozen=True)
class Values:
    """The values that a piece of a program needs of its module: what it has, and what is computed of that alone.

    Args:
        read: reads the tensors of the module.
        work: `None, *tensors, *constants -> values`; some of the values are the tensors themselves.
        constants: tensors and modules of the graph alone.
    """

    read: Reader
    work: Callable[..., tuple[Any, ...]]
    constants: tuple[Any, ...] = ()

    def of(self, module: nn.Module) -> tuple[Any, ...]:
        """Return the values for the tensors that `module` has now."""
        return self.work(None, *self.read(module), *self.constants)


def reader_of(module: nn.Module, names: Sequence[str]) -> Reader:
    """Return a reader of the tensors and submodules of these qualified names, for modules like `module`."""
    paths = tuple(tuple(name.split(".")) for name in names)
    registries = tuple(_registry(_attribute(module, path[:-1]), path[-1]) for path in paths)
    return Reader(paths, _from_registries(paths, registries))


def reader_of_modes(names: Sequence[str]) -> Reader:
    """Return a reader of the modes of modules, by the qualified names of their flags."""
    paths = tuple(tuple(name.split(".")) for name in names)
    return Reader(paths, _from_registries(paths, (None,) * len(paths)))


@functools.lru_cache(maxsize=256)  # the layers of a deep model have one
def _from_registries(paths: Paths, registries: tuple[str | None, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return a function of None and a module that reads `paths` from these registries; without one, as attributes."""
    graph = fx.Graph()
    owners: dict[tuple[str, ...], fx.Node] = {(): graph.placeholder("module")}
    found: dict[tuple[tuple[str, ...], str], fx.Node] = {}

    def registered(owner: tuple[str, ...], registry: str, name: str) -> fx.Node:
        if (owner, registry) not in found:
            found[owner, registry] = graph.call_function(getattr, (owner_at(owner), registry))
        return graph.call_function(getitem, (found[owner, registry], name))

    def owner_at(path: tuple[str, ...]) -> fx.Node:
        if path not in owners:
            owners[path] = registered(path[:-1], MODULES, path[-1])
        return owners[path]

    values = []
    for (*parents, name), registry in zip(paths, registries, strict=True):
        owner = tuple(parents)
        if registry is None:
            values.append(graph.call_function(getattr, (owner_at(owner), name)))
        else:
            values.append(registered(owner, registry, name))
    graph.output(tuple(values))
    return function_of(graph)


def _registry(owner: Any, name: str) -> str | None:
    return next((each for each in REGISTRIES if name in getattr(owner, each)), None)


def _attribute(module: Any, path: Sequence[str]) -> Any:
    try:
        return functools.reduce(getattr, path, module)
    except AttributeError as error:
        raise AdapterError(
            f"{type(module).__name__} has no {'.'.join(path)!r} any more, which the graph reads. A tensor or a module"
            " may be replaced by another of the same name; it may not be taken away."
        ) from error
