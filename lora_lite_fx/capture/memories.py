"""Let functions forget what they remember of a run without data, because a later call would get that instead of values.

`functools.lru_cache` keeps results by arguments such as sizes, for all models of a class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Let the functions in the modules of `model`'s classes forget their results after the body.

    Safe because what they remember saves time and nothing else.
    """
    try:
        yield
    finally:
        for name in {type(module).__module__ for module in model.modules()}:
            _forget(sys.modules.get(name))


def _forget(module: Any) -> None:
    values = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes = [value for value in values if isinstance(value, type)]
    for function in (*values, *(value for kind in classes for value in vars(kind).values())):
        function = getattr(function, "__func__", function)  # of a static or class method
        # A decorator may hold the function that remembers.
        cells = getattr(function, "__closure__", None) or ()
        for value in (function, *(cell.cell_contents for cell in cells if _has_contents(cell))):
            if callable(clear := getattr(value, "cache_clear", None)):
                clear()


def _has_contents(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # not bound yet
        return False
    return True
