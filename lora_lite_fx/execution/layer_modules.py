"""Modules that run a part of a program: its layers, each at its own path in the model."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import fx, nn

from ..capture.origins.hooks import hook_name, hooks_with_keywords_on
from ..compat.torch_modules import children_of
from ..errors import AdapterError
from ..graph.layers import is_layer, layer_of
from ..graph.tensors import module_at

Part = Callable[..., Any]
"""`module, *inputs -> results`: what a layer computes in a program, of the tensors that `module` has now.

The result is a tensor; or a tuple, of which the first is the one that the layer computes last, as a rule its output.
"""


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""The names under which the wrappers of torch.compile and of checkpointing keep the module that computes."""


class _Called(threading.local):
    """The modules that programs of this thread call just now, with their paths."""

    def __init__(self) -> None:
        self.modules: list[tuple[Any, str]] = []


_called = _Called()
_warned_of: WeakSet[nn.Module] = WeakSet()


def call_of(module: nn.Module, path: str) -> Callable[..., Any]:
    """Return how a program calls the module at a path: as it is, unless hooks stand on it that get keyword arguments.

    Warns:
        UserWarning: such hooks do, which do not get those of the model's own module.
    """
    hooks = hooks_with_keywords_on(module)
    if not hooks:
        return module
    if module not in _warned_of:
        _warned_of.add(module)
        warnings.warn(
            f"A hook on {path!r} takes keyword arguments, and does not get those of the model's module:"
            f" {', '.join(map(hook_name, hooks))}. A layer of a graph gets what it reads as positional arguments, in"
            " the order in which it reads them.",
            stacklevel=2,
        )
    return functools.partial(_call_with_part, module, path)


def _call_with_part(module: nn.Module, path: str, *args: Any, **kwargs: Any) -> Any:
    _called.modules.append((module, path))
    try:
        return module(*args, **kwargs)
    finally:
        _called.modules.pop()


class RunsParts:
    """A module that a program calls with the part of it that the module runs.

    It is called as a module, because then whatever stands on a module acts: hooks, `fully_shard`, `compile()`. It is
    called with the part, because one model has several programs.
    """

    runs_parts = True
    __call__ = nn.Module.__call__  # transformers' layers have one of their own, which checkpoints

    def forward(
        self,
        *args: Any,
        part: Part | None = None,
        unseen: tuple[Any, ...] = (),
        more: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a part of a program; called without one, do what the module's own class does.

        Args:
            args: the activations that the part reads. A hook may change them, as those of the model's own module.
            part: given by the program.
            unseen: what else the part reads and the module does not have: values that `frozen` keeps, coefficients.
            more: takes the results after the first one, if it is given.
            kwargs: of a call without a part.
        """
        if part is None:
            if taken := [path for module, path in _called.modules if module is self]:
                raise AdapterError(
                    f"A hook on {taken[-1]!r} took keyword arguments away, which say what a layer of a graph runs. The"
                    " way out: return the keyword arguments as they are; activations are positional arguments here."
                )
            return self.run_alone(*args, **kwargs)
        results = part(self, *unseen, *args)
        if more is None:
            return results
        more += results[1:]
        return results[0]

    def run_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module for a call without a part."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


_PLAIN = "_lora_lite_fx_plain_class"
"""An attribute of classes, of a name that no child or buffer of a module has: it would hide them."""


@functools.cache
def running_parts(cls: Any, kind: Any = RunsParts) -> Any:
    """Return a subclass of `cls`, of the same name, whose modules run parts of programs.

    Args:
        cls: the class of a module.
        kind: `RunsParts`, or a subclass that it gets the methods of.
    """
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _PLAIN: cls}
    return type(cls.__name__, (kind, cls), names)


def plain_class(cls: type) -> Any:
    """Return the class that `running_parts` made `cls` of; itself if it did not."""
    return getattr(cls, _PLAIN, cls)


def user_classes(cls: type) -> list[type]:
    """Return `cls` and its bases in the order in which Python asks them, without `nn.Module` and what is added here."""
    ours = __name__.partition(".")[0]
    return [
        base
        for base in cls.__mro__
        if base not in nn.Module.__mro__
        and _PLAIN not in vars(base)
        and (issubclass(base, nn.Module) or base.__module__.partition(".")[0] != ours)
    ]


class GraphLayer(RunsParts, nn.Module):
    """A module of a rewritten graph: it has the tensors of the user's module at its path, and none of its code."""

    own_part: Part | None = None

    def run_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Run what the layer runs in training.

        Args:
            args: the values that the layer reads and that are not tensors of it.
            kwargs: are refused.

        Raises:
            AdapterError: the graph was not called yet, or the module is not a layer that runs as one piece.
        """
        if self.own_part is None:
            raise AdapterError(
                "This module of a rewritten graph does not run by itself. A layer does, as graph.model.layers[0], after"
                " the first call of the graph and if the graph runs it once."
            )
        return self.own_part(self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "own_part"}


def make_layers(gm: fx.GraphModule) -> None:
    """Make layers callable, see `GraphLayer`, and stacks of them lists; add the layers that have no tensors."""
    for layer in dict.fromkeys(map(layer_of, gm.graph.nodes)):
        module_at(gm, (layer or "").rpartition("@")[0])
    for name, module in gm.named_modules():
        if type(module) is nn.Module:
            children = children_of(module)
            is_list = set(children) == set(map(str, range(len(children)))) != set()
            module.__class__ = nn.ModuleList if is_list and not is_layer(name) else GraphLayer
