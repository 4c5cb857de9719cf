"""What stands on the modules of a model besides their tensors: hooks, and ties between parameters."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..errors import AdapterError
from .pieces import pieces_of
from .reading import Reader, reader_of

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Watch:
    """The modules of a model that its programs do not call as modules, and the parameters that have several names.

    Args:
        gm: the graph.
        hooks: the registries of hooks of these modules.
        owners: for each registry, the qualified name of its module.
        ties: groups of names of one parameter.
        read: reads the parameters of all groups.
    """

    gm: fx.GraphModule
    hooks: list[dict[int, Any]]
    owners: list[str]
    ties: list[list[str]]
    read: Reader
    _acting: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: fx.GraphModule, host: nn.Module) -> Watch:
        """Return the watch of the programs of `gm` that run on `host`."""
        called = [path for path, _ in pieces_of(gm, gm.graph)]
        hooks: list[dict[int, Any]] = []
        owners: list[str] = []
        for name, module in host.named_modules():
            if name and called.count(name) != 1:
                registries = [getattr(module, kind) for kind in _KINDS]
                hooks += registries
                owners += [name] * len(registries)
        names = defaultdict(list)
        for name, parameter in host.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        ties = [group for group in names.values() if len(group) > 1]
        return cls(gm, hooks, owners, ties, reader_of(host, [name for group in ties for name in group]))

    def hooked(self) -> tuple[str, ...]:
        """Return the names of the modules outside layers on which hooks stand; warn of hooks elsewhere, once each."""
        if not any(self.hooks):
            return ()
        names = dict.fromkeys(name for name, hooks in zip(self.owners, self.hooks, strict=True) if hooks)
        return tuple(name for name in names if self._acts(name))

    def _acts(self, name: str) -> bool:
        if name not in self._acting:
            pieces = [path for path, _ in pieces_of(self.gm, self.gm.graph, (name,))]
            self._acting[name] = pieces.count(name) == 1
            if not self._acting[name]:
                hooks = [
                    hook
                    for owner, hooks in zip(self.owners, self.hooks, strict=True)
                    if owner == name
                    for hook in hooks.values()
                ]
                warnings.warn(
                    f"A hook on {name!r} does not act: {', '.join(map(_name, hooks))}. The graph does not run that"
                    " module as a module of its own. Hooks act on the model, on its layers, and on modules outside of"
                    " layers that run once, as the embedding and the head.",
                    stacklevel=2,
                )
        return self._acting[name]

    def check_ties(self, host: nn.Module) -> None:
        """Raise AdapterError if a parameter that has several names in `host` has been replaced under one of them."""
        if not self.ties:
            return
        values = iter(self.read(host))
        for group in self.ties:
            first, *others = [next(values) for _ in group]
            for name, other in zip(group[1:], others, strict=True):
                if other is not first:
                    raise AdapterError(
                        f"{group[0]} and {name} were one parameter when the graph was captured, and are two now. The"
                        " graph reads it under one of its names. The way out: replace it under all names, or capture"
                        " the model again."
                    )


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
