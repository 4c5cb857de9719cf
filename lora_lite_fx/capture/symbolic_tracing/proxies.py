"""The values of symbolic tracing, which record `x += y` as a write.

Those of `torch.fx` record `x = x + y`. What reads the tensor by another name, such as a view, would then read it as it
was before.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ...graph.augmented import AUGMENTED

_NUMBERS = frozenset({"size", "dim", "numel", "nelement", "ndimension", "stride", "shape", "ndim"})
"""The methods and attributes of a tensor that are numbers or tuples of them."""


class Proxy(fx.Proxy):
    """A value that records augmented assignments."""

    def __getattr__(self, k: str) -> Any:
        return Attribute(self, k)


class Attribute(Proxy, fx.proxy.Attribute):
    """An attribute of a value, such as `x.T`."""


def _record(name: str) -> None:
    plain = getattr(operator, f"__{name[1:]}__")

    def assign(self: fx.Proxy, value: Any) -> fx.Proxy:
        return self.tracer.create_proxy(
            "call_function", plain if _is_number(self.node) else AUGMENTED[name], (self, value), {}
        )

    setattr(Proxy, f"__{name}__", assign)


for _name in AUGMENTED:
    _record(_name)


def _is_number(node: fx.Node) -> bool:
    """Tell whether a value is known to be a size, or computed of sizes alone."""
    if node.op == "call_method" or node.target is getattr:
        return (node.target if node.op == "call_method" else node.args[1]) in _NUMBERS
    plain = getattr(node.target, "__module__", "") == "_operator"
    return plain and bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))
