"""The values of symbolic tracing, which record `x += y` as a write.

Those of `torch.fx` record `x = x + y`. What reads the tensor by another name, such as a view, would then read it as it
was before.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

from ...graph.writes import AUGMENTED

_GETATTR = getattr  # itself: while a model is traced, the name means what `asked_types` puts there
_NUMBERS = frozenset({"dim", "numel", "nelement", "ndimension", "ndim"})
_SIZES = frozenset({"size", "shape", "stride"})
"""The methods and attributes of a tensor that are numbers, and those that are tuples of numbers."""


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
