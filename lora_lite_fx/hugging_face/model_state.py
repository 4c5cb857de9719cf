"""See what a model is besides the values of its tensors: its modules, their classes, numbers and functions, and which
tensors they have.

A graph has them as they were when it was captured, whereas it reads the tensors in each call.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.placement import adapter_tensor_names
from ..capture.origins.hooks import weight_hooks_on
from ..compat.torch_modules import FORWARD_PRE_HOOKS, buffers_of, children_of, hooks_of, parameters_of
from ..execution.layer_modules import WRAPPED, user_classes
from ..execution.snapshot import Same, Snapshot, value_to_compare
from ..graph.layers import computes_weights, is_layer
from .settings import names_in_code, settings_of

_LATER = ("_loss_function",)
"""Attributes that a model may get when it has them already in another way: `model.loss_function = f` sets this one."""


class _Module(NamedTuple):
    """A module as it was.

    Args:
        module: itself.
        kind: its class.
        tensors: the names of its own parameters and buffers that it has, without those of adapters.
        lost: the names of tensors of adapters that it should have and does not, because another module is in its place.
        settings: its settings by name.
        has_own_forward: whether `forward` of its class is replaced on it.
    """

    module: nn.Module
    kind: type
    tensors: frozenset[str]
    lost: frozenset[str]
    settings: dict[str, Any]
    has_own_forward: bool

    @classmethod
    def of(cls, module: nn.Module, adapters: frozenset[str]) -> _Module:
        """Return what `module` is now, which has the tensors of these names from adapters."""
        attributes = vars(module)
        named = (*parameters_of(module).items(), *buffers_of(module).items())
        computed: Any = module.parametrizations if is_parametrized(module) else ()
        present = frozenset((*(name for name, tensor in named if tensor is not None), *computed))
        own = {name: value_to_compare(owner[key]) for name, owner, key in settings_of(module)}
        settings = {name: attributes.get(name) for name in _LATER} | own | {FORWARD_PRE_HOOKS: weight_hooks_on(module)}
        return cls(module, type(module), present - adapters, adapters - present, settings, "forward" in attributes)

    def change(self, now: _Module) -> str:
        """Return in words how the module that has this one's place now differs from it; empty if it does not."""
        if not self._computes_like(now):
            return f" is a {now.kind.__name__}, and was a {self.kind.__name__}"
        for name in sorted(now.lost - self.lost):
            return f".{name} was taken away"
        for name in sorted(self.tensors ^ now.tensors):
            return f".{name} was {'taken away' if name in self.tensors else 'added'}"
        for name, value in self.settings.items():
            if name not in now.settings:
                if value is None:  # a tensor now, as models remember some for the next call
                    continue
                return f".{name} was taken away"
            if now.settings[name] != value:
                return f".{name} is {_shown(now.settings[name])}, and was {_shown(value)}"
        for name in sorted(now.settings.keys() - self.settings.keys()):
            if now.settings[name] is not None and name in names_in_code(now.kind):  # None: models forget a tensor so
                return f".{name} was added"
        return ""

    def _computes_like(self, now: _Module) -> bool:
        """Return whether the class of `now` has all that this one's has, whatever it adds, as `fully_shard` does."""
        if now.kind is self.kind:
            return True
        then, later = _found_in(self.kind), _found_in(now.kind)
        return all(later.get(name) is value for name, value in then.items() if name not in self.tensors)


class ModelState:
    """What a model was at one time besides its tensors.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._look()

    def is_as_it_was(self) -> bool:
        """Return False if anything may have changed. Each call asks."""
        return self._snapshot.holds()

    def change(self) -> str:
        """Return in words what has changed of that which graphs have for good; empty if nothing has.

        Warns:
            UserWarning: `forward` of a module in a layer or outside of layers was replaced on the instance, which does
                not act. That of a layer is called by programs.
        """
        before, earlier = self._modules, self._snapshot
        self._look()
        self._warn_of_forwards(before)
        if kind := self._snapshot.replaced_forward(earlier):
            return f"forward of {kind} is another function"
        for name in sorted(before.keys() ^ self._modules.keys()):
            if not computes_weights(name):  # graphs read what is computed in each call
                return f"{name} was {'taken away' if name in before else 'added'}"
        for name, module in before.items():
            if name in self._modules and (change := module.change(self._modules[name])):
                return f"{name or type(self.model).__name__}{change}"
        return ""

    def _look(self) -> None:
        adapters = defaultdict(set)
        for name in adapter_tensor_names(self.model):
            path, _, leaf = name.rpartition(".")
            adapters[path].add(leaf)
        modules = dict(_modules_of(self.model))
        self._modules = {name: _Module.of(module, frozenset(adapters[name])) for name, module in modules.items()}
        self._snapshot = Snapshot(
            modules,
            registries=(hooks_of(module, FORWARD_PRE_HOOKS) for module in modules.values()),
            settings=((owner, key) for module in modules.values() for _, owner, key in settings_of(module)),
        )

    def _warn_of_forwards(self, before: dict[str, _Module]) -> None:
        new = [
            name
            for name, now in self._modules.items()
            if name and now.has_own_forward and not before.get(name, now).has_own_forward
            if not is_layer(name) or computes_weights(name)
        ]
        if new:
            warnings.warn(
                f"forward was replaced on {new[0]!r}{f' and {len(new) - 1} other modules' if new[1:] else ''}, and does"
                " not act, because graphs do not run it. The way out: replace it before adapt, or put a module of"
                " another class in its place.",
                stacklevel=2,
            )


def _modules_of(model: nn.Module, name: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute by name: without those that hold the tensors of adapters, and without wrappers.

    Args:
        model: where to begin.
        name: its own.
        above: the modules that it is in, in case that it has one of them.
    """
    yield name, model
    for key, child in children_of(model).items():
        while child is not None and (inside := [each for each in WRAPPED if each in children_of(child)]):
            child = children_of(child)[inside[0]]
        if child is not None and type(child) is not nn.Module and child not in above:
            yield from _modules_of(child, f"{name}.{key}" if name else key, (*above, model))


def _found_in(kind: type) -> dict[str, Any]:
    """Return what a class and its bases define, as instances find it: without special methods and `nn.Module`."""
    found: dict[str, Any] = {}
    for base in reversed(user_classes(kind)):
        above = kind.__mro__[kind.__mro__.index(base) + 1 :]
        for name, value in vars(base).items():
            inherited = next((vars(each)[name] for each in above if name in vars(each)), None)
            if (not name.startswith("__") or name == "__call__") and not _wraps_once_more(value, inherited):
                found[name] = value
    return found


def _wraps_once_more(value: Any, inherited: Any) -> bool:
    """Return whether a method is what the class inherits, in one more wrapper of the same kind.

    Layers of transformers wrap `forward` of each subclass, also of one that `fully_shard` makes.
    """
    if not isinstance(value, FunctionType) or not isinstance(inherited, FunctionType):
        return False
    return value.__code__ is inherited.__code__ and vars(value).get("__wrapped__") is inherited


def _shown(value: Any) -> str:
    if isinstance(value, Same):
        value = value.value
    return getattr(value, "__qualname__", None) or repr(value)
