"""Let functions forget what they remember of a run without data, because a later call would get that instead of values.

`functools.lru_cache` keeps results by arguments such as sizes, for all models of a class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
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
    if module is None:  # of classes that were made without one
        return
    values = list(vars(module).values())
    classes = [value for value in values if isinstance(value, type) and value.__module__ == module.__name__]
    for value in (*values, *(value for kind in classes for value in vars(kind).values())):
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        # A decorator may hold the function that remembers.
        cells = (function.__closure__ or ()) if isinstance(function, FunctionType) else ()
        for held in (function, *(cell.cell_contents for cell in cells if _has_contents(cell))):
            if isinstance(held, _REMEMBERS):
                held.cache_clear()


_REMEMBERS = type(functools.lru_cache(lambda: None))


def _has_contents(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # not bound yet
        return False
    return True
