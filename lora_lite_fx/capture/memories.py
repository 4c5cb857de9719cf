"""Let functions and modules forget what they remember of a run without data, which a later call would get as values.

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
from torch._subclasses.fake_tensor import FakeTensor  # nothing public tells a tensor without data
from torch._subclasses.functional_tensor import FunctionalTensor  # of which torch.export makes those of a trace


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Let the functions in the modules of `model`'s classes forget their results after the body; and modules theirs.

    Safe because what functions remember saves time and nothing else, and modules get back what they had before.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, then in attributes:  # as Clvp keeps its rotations, and RecurrentGemma its states
            for name in [name for name, value in now.items() if isinstance(value, (FakeTensor, FunctionalTensor))]:
                del now[name]
                now.update({name: then[name]} if name in then else {})
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
