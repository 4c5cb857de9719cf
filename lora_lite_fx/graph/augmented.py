"""Augmented assignments as functions of a graph, because `x += y` writes to a tensor, and only renames a number.

`torch.fx` prints `operator.iadd` as the statement itself, which would also change a number that is read again later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

Function = Callable[[Any, Any], Any]


def _function(name: str) -> Function:
    operation: Function = getattr(operator, name)

    def augmented(target: Any, value: Any) -> Any:
        return operation(target, value)

    augmented.__name__ = augmented.__qualname__ = name
    return augmented


AUGMENTED: dict[str, Function] = {
    name: _function(name)
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("ilshift", "irshift", "iand", "ixor", "ior"),
    )
}
"""The functions, by the names that they have in `operator` too."""
