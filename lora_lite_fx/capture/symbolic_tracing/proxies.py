"""The values of symbolic tracing: they record `x += y` as a write, and are asked for their types as tensors are.

Those of `torch.fx` record `x = x + y`. What reads the tensor by another name, such as a view, would then read it as it
was before.

A value of a trace is not a tensor. So `isinstance(x, torch.Tensor)` and `hasattr(x, name)` would answer otherwise than
in calls of the model, and the graph would go another way, in silence. The answers here are those for a tensor, and the
graph checks in each call that the value is one. For parameters, buffers and sizes they are those for what these are.
"""

from __future__ import annotations

import builtins
import copy
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...compat.torch import assert_in_graph, pytree
from ...compat.torch_modules import buffers_of, parameters_of
from ...graph.writes import AUGMENTED

_GETATTR = getattr  # itself: while a model is traced, the name means what `AskedTypes` puts there
_NUMBERS = frozenset({"dim", "numel", "nelement", "ndimension", "ndim"})
_SIZES = frozenset({"size", "shape", "stride"})
"""The methods and attributes of a tensor that are numbers, and those that are tuples of numbers."""
PLAIN = "of_python"
"""The attribute of a function of the scope that holds Python's own, which graphs call: torch.fx records `getattr`."""
_TENSOR = torch.empty(0)
_ASKING_FOR_USERS = ("torch", pytree.__name__)
"""The modules of torch that ask on behalf of their callers: `torch.is_tensor`, `tree_map_only`."""


class Proxy(fx.Proxy):
    """A value that records augmented assignments."""

    def __getattr__(self, k: str) -> Any:
        return Attribute(self, k)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.Proxy:
        """Record the copy of a tensor, because `torch.fx` copies the trace."""
        return self.tracer.create_proxy("call_function", copy.deepcopy, (self,), {})

    def __len__(self) -> int:
        with self.tracer.noting_refusals():  # type: ignore[attr-defined]
            return super().__len__()


class Attribute(Proxy, fx.proxy.Attribute):
    """An attribute of a value, such as `x.T`."""


def _record(name: str) -> None:
    plain = getattr(operator, f"__{name[1:]}__")

    def assign(self: fx.Proxy, value: Any) -> fx.Proxy:
        return self.tracer.create_proxy(
            "call_function", plain if number_like(self.node) is not None else AUGMENTED[name], (self, value), {}
        )

    setattr(Proxy, f"__{name}__", assign)


for _name in AUGMENTED:
    _record(_name)


def number_like(node: fx.Node) -> int | tuple[int, ...] | None:
    """Return an object of the type of a value that is a size, or computed of sizes alone; None for other values."""
    name = node.target if node.op == "call_method" else node.args[1] if node.target is _GETATTR else None
    if name in _SIZES:
        return torch.Size() if len(node.args) + len(node.kwargs) == (1 if node.op == "call_method" else 2) else 1
    plain = getattr(node.target, "__module__", "") == "_operator" and node.all_input_nodes
    if name in _NUMBERS or (plain and all(number_like(operand) is not None for operand in node.all_input_nodes)):
        return 1
    return None


class AskedTypes:
    """Lets four functions of Python know the values of traces, in a scope. For all other objects they are the same."""

    def __init__(self) -> None:
        self._checked: set[fx.Node] = set()
        self._plain: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> None:
        for name in ("isinstance", "hasattr", "callable", "getattr"):
            self._plain[name] = plain = vars(builtins)[name]
            setattr(builtins, name, self._knowing(plain))

    def __exit__(self, *_: Any) -> None:
        for name, plain in self._plain.items():
            setattr(builtins, name, plain)

    def _knowing(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return `plain`, which is asked of the stand-in for a value of a trace, if a model asks it."""

        def ask(value: Any, *others: Any) -> Any:
            of_trace = type(value) is Proxy or type(value) is Attribute
            if not of_trace or not _is_of_users(sys._getframe(1).f_globals.get("__name__", "")):
                return plain(value, *others)
            if plain is not self._plain["getattr"]:
                return plain(self._stand_in(value), *others)
            name, *default = others
            lacks = default and not self._plain["hasattr"](self._stand_in(value), name)
            return default[0] if lacks else plain(value, name)

        vars(ask)[PLAIN] = plain
        return ask

    def _stand_in(self, value: Any) -> Any:
        """Return an object of the type that a value has, and let the graph check that a tensor is one."""
        node = value.node
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            module = value.tracer.root.get_submodule(path)
            held = {**vars(module), **buffers_of(module), **parameters_of(module)}
            return held.get(leaf, _TENSOR)
        if (number := number_like(node)) is not None:
            return number
        if node not in self._checked:
            self._checked.add(node)
            said = value.tracer.create_proxy("call_function", torch.is_tensor, (value,), {})
            message = (
                f"{node.name} is not a tensor, as it was taken for when the model was traced. The way out: capture the"
                " model with example_inputs."
            )
            value.tracer.create_proxy("call_function", assert_in_graph, (said, message), {})
        return _TENSOR


def _is_of_users(module: str) -> bool:
    return module in _ASKING_FOR_USERS or module.partition(".")[0] not in ("torch", __name__.partition(".")[0])
