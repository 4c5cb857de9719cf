"""Let functions, classes, files and modules forget what they remember of a run without data.

A later call would get it as values. `functools.lru_cache` keeps results by arguments such as sizes, for all models of a
class; so do tables in classes and files.

Needed by DINOv3, whose positions are remembered by sizes, and by Clvp, RecurrentGemma and Funnel, which keep rotations,
states and a length in modules. Entered for every model, because the user's own model would return tensors without data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import SymBool, SymFloat, SymInt, nn

from ...compat.torch import FakeTensor, FunctionalTensor
from ...compat.torch_modules import children_of
from ..process_state.python_state import PythonState
from ..shared_copy import contents_of
from .quirk import Call, Quirk, always, files_of


@contextmanager
def forgetting(model: nn.Module, call: Call) -> Iterator[None]:
    """Let functions in the files of `model`'s classes forget what they learn in the body, and put back its state.

    Safe because what a function learns from calls of a model saves time and nothing else, and modules, classes and
    files get back what they had before. A function that learns nothing in the body keeps all, as one that holds the
    models of a script.
    """
    state = PythonState(model)
    children = [(children_of(module), dict(children_of(module))) for module in model.modules()]
    files = [*files_of(model)]
    before = {function: function.cache_info().misses for function in _remembering(files)}
    try:
        yield
    finally:
        state.restore(_has_no_data)
        for now, then in children:
            for name in [name for name, child in now.items() if child is not then.get(name) and _has_no_data(child)]:
                if name in then:
                    now[name] = then[name]
                else:
                    del now[name]
        for function in _remembering(files):
            if function.cache_info().misses != before.get(function, 0):
                function.cache_clear()


def _has_no_data(value: Any) -> bool:
    """Tell whether a value, or a part of it, is of a run without data."""
    if isinstance(value, nn.Module):
        return any(map(_has_no_data, (*value.parameters(), *value.buffers())))
    if type(value) in (list, tuple, set, dict):
        return any(map(_has_no_data, value.values() if type(value) is dict else value))
    return isinstance(value, _WITHOUT_DATA)


_WITHOUT_DATA = (FakeTensor, FunctionalTensor, SymInt, SymFloat, SymBool)


def _remembering(files: Iterable[ModuleType]) -> Iterator[Any]:
    """Yield the functions with a memory in these files, and in their classes."""
    for file in files:
        values = list(vars(file).values())
        classes = [value for value in values if isinstance(value, type) and value.__module__ == file.__name__]
        for value in (*values, *(value for kind in classes for value in vars(kind).values())):
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            # A decorator may hold the function that remembers.
            cells = (function.__closure__ or ()) if isinstance(function, FunctionType) else ()
            for held in (function, *(each for cell in cells for each in contents_of(cell))):
                if isinstance(held, _REMEMBERS):
                    yield held


_REMEMBERS = type(functools.lru_cache(lambda: None))


QUIRK = Quirk(always, forgetting)
