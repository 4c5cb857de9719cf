"""See what a model is besides its tensors: its modules, and the numbers and functions that these have.

A graph has them as they were when it was captured, whereas it reads the tensors in each call.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..capture.hooks import weight_hooks_on
from ..compat.torch import FORWARD_PRE_HOOKS, MODULES, buffers_of, children_of, hooks_of, parameters_of
from ..execution.layer import plain_class
from ..graph.layers import is_layer

_NUMBERS = (bool, int, float, str, type(None))

_NO_PART_OF_GRAPHS = frozenset(
    (
        *("training", "gradient_checkpointing", "_gradient_checkpointing_func", "forward"),
        *("warnings_issued", "model_tags", "name_or_path"),
    )
)
"""Each call looks at the first three, and a new `forward` is warned of. The others are notes of trainers and files."""

_LATER = ("_loss_function",)
"""Attributes that a model may get when it has them already in another way: `model.loss_function = f` sets this one."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""The names under which the wrappers of torch.compile and of checkpointing keep the module that computes."""


class _Module(NamedTuple):
    """A module as it was.

    Args:
        module: itself.
        kind: its class, as the user knows it.
        tensors: the names of its own parameters and buffers.
        settings: its numbers and functions by name, and lists, tuples and dicts of numbers.
        read: returns of its attributes those that a call compares, its children among them.
        was: what `read` returned.
        size: the number of its attributes.
        has_own_forward: whether `forward` of its class is replaced on it.
    """

    module: nn.Module
    kind: type
    tensors: frozenset[str]
    settings: dict[str, Any]
    read: Callable[[dict[str, Any]], Any]
    was: Any
    size: int
    has_own_forward: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        """Return what `module` is now."""
        kind: Any = type(module)
        attributes = vars(module)
        named = (*parameters_of(module).items(), *buffers_of(module).items())
        computed: Any = ()
        if is_parametrized(module):
            computed, kind = module.parametrizations, kind.__base__
        tensors = frozenset((*(name for name, tensor in named if tensor is not None), *computed))
        present = {name: _kept(value) for name, value in attributes.items() if _is_setting(name, value)}
        settings = (
            {name: attributes.get(name) for name in _LATER} | present | {FORWARD_PRE_HOOKS: weight_hooks_on(module)}
        )
        read = itemgetter(MODULES, FORWARD_PRE_HOOKS, *present)
        copies = {MODULES: dict(children_of(module)), FORWARD_PRE_HOOKS: dict(hooks_of(module, FORWARD_PRE_HOOKS))}
        was = read(copies | present)
        size, has_own_forward = len(attributes), "forward" in attributes
        return cls(module, plain_class(kind), tensors, settings, read, was, size, has_own_forward)

    def change(self, now: _Module) -> str:
        """Return in words how the module that has this one's place now differs from it; empty if it does not."""
        if now.module is not self.module:  # the class of a module itself changes without effect, as by fully_shard
            if now.kind is not self.kind:
                return f" is a {now.kind.__name__}, and was a {self.kind.__name__}"
            for name in sorted(self.tensors ^ now.tensors):
                return f".{name} was {'taken away' if name in self.tensors else 'added'}"
        for name, value in self.settings.items():
            if name not in now.settings:
                if value is None:  # a tensor now, as models remember some for the next call
                    continue
                return f".{name} was taken away"
            if now.settings[name] != value:
                return f".{name} is {_shown(now.settings[name])}, and was {_shown(value)}"
        return ""


class ModelState:
    """What a model was at one time besides its tensors.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._look()

    def is_as_it_was(self) -> bool:
        """Return False if anything may have changed. Each call asks, so it costs a third of a microsecond a module."""
        try:
            return all(read(has) == was and len(has) == size for has, read, was, size in self._compared)
        except KeyError:  # an attribute was taken away
            return False

    def change(self) -> str:
        """Return in words what has changed of that which graphs have for good; empty if nothing has.

        Warns:
            UserWarning: `forward` of a module in a layer or outside of layers was replaced on the instance, which does
                not act. That of a layer is called by programs.
        """
        before = self._modules
        self._look()
        self._warn_of_forwards(before)
        for name in sorted(before.keys() ^ self._modules.keys()):
            return f"{name} was {'taken away' if name in before else 'added'}"
        for name, module in before.items():
            if change := module.change(self._modules[name]):
                return f"{name or type(self.model).__name__}{change}"
        return ""

    def _look(self) -> None:
        self._modules = {name: _Module.of(module) for name, module in _modules_of(self.model)}
        self._compared = [(vars(each.module), each.read, each.was, each.size) for each in self._modules.values()]

    def _warn_of_forwards(self, before: dict[str, _Module]) -> None:
        new = [
            name
            for name, now in self._modules.items()
            if name and not is_layer(name) and now.has_own_forward and not before.get(name, now).has_own_forward
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

    Parametrizations compute tensors, which graphs read by name in each call.

    Args:
        model: where to begin.
        name: its own.
        above: the modules that it is in, in case that it has one of them.
    """
    yield name, model
    for key, child in children_of(model).items():
        while child is not None and (inside := [each for each in WRAPPED if each in children_of(child)]):
            child = children_of(child)[inside[0]]
        of_tensors = type(child) is nn.Module or (key == "parametrizations" and is_parametrized(model))
        if child is not None and not of_tensors and child not in above:
            yield from _modules_of(child, f"{name}.{key}" if name else key, (*above, model))


def _is_setting(name: str, value: Any) -> bool:
    if name in _NO_PART_OF_GRAPHS:
        return False
    if name.startswith("_"):  # torch and transformers have objects of many kinds under such names
        return (value is not None and isinstance(value, _NUMBERS)) or isinstance(value, FunctionType)
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
    return callable(value) or all(isinstance(part, _NUMBERS) for part in parts)


def _kept(value: Any) -> Any:
    """Return a value to compare with later: a copy of a container, which may change in place."""
    return copy.copy(value) if type(value) in (list, dict) else value


def _shown(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
