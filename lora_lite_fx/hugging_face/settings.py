"""Find what a module has in Python besides tensors and modules: numbers, functions, containers of them, and objects.

A graph has them as they were when it was captured. Of the code of a user, which is that of no library, they are also
what its classes have, and the numbers of its files that it names.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..capture.shared_copy import globals_read
from ..execution.layer_modules import user_classes
from ..execution.snapshot import is_plain

_NO_PART_OF_GRAPHS = frozenset(
    (
        *("training", "gradient_checkpointing", "_gradient_checkpointing_func", "forward"),
        *("warnings_issued", "model_tags", "name_or_path"),
    )
)
"""Each call looks at the first three, and a new `forward` is warned of. The others are notes of trainers and files."""

_OF_ALL_MODULES = frozenset(vars(nn.Module()))

_LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "transformers", "bitsandbytes", "torchao"))
"""Packages whose code is not a user's own: objects of theirs are notes, configs, and tensors that are packed."""
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_DEEPEST = 3
"""How far objects in objects are looked into."""


class Setting(NamedTuple):
    """A value that a graph has as it was.

    Args:
        name: as code that has the module names it: "options.scale".
        owner: the attributes of the module, of an object that it has, or of its class; or the names of a file.
        key: the name of the value there.
    """

    name: str
    owner: Mapping[str, Any]
    key: str


def settings_of(module: nn.Module) -> Iterator[Setting]:
    """Yield the settings of a module, with those of the objects that it has and that a user's code names."""
    attributes = vars(module)
    kind: Any = type(module)
    own_names = names_in_own_code(kind)
    for name, value in list(attributes.items()):
        is_followed_otherwise = isinstance(value, (nn.Module, Tensor)) or hasattr(value, "get_text_config")
        if name in own_names and name not in _NO_PART_OF_GRAPHS and not is_followed_otherwise:
            yield Setting(name, attributes, name)
            yield from _inside(name, value, _DEEPEST)
        elif _is_setting(module, name):
            yield Setting(name, attributes, name)
    yield from _of_class_and_file(kind)


@functools.cache
def _of_class_and_file(kind: Any) -> tuple[Setting, ...]:
    """Return the numbers that a user's code of a class has in the class, and those that it reads in its file."""
    found: list[Setting] = []
    for base in _own_classes(kind):
        numbers = [name for name, value in vars(base).items() if not name.startswith("__") and is_plain(value)]
        found += [Setting(f"{base.__name__}.{name}", vars(base), name) for name in numbers]
        for function in _functions_of(base):
            found += [
                Setting(f"{function.__module__}.{name}", function.__globals__, name)
                for name, value in sorted(globals_read(function).items())
                if is_plain(value) or isinstance(value, Tensor)
            ]
    return tuple(found)


def _inside(path: str, value: Any, deepest: int) -> Iterator[Setting]:
    """Yield what is inside of an object, or of the objects in a container."""
    if deepest == 0:
        return
    if type(value) in (list, tuple, dict):
        items = value.items() if type(value) is dict else enumerate(value)
        for key, item in items:
            yield from _inside(f"{path}[{key!r}]", item, deepest - 1)
    elif _is_object(value):
        attributes = vars(value)
        for name, each in list(attributes.items()):
            yield Setting(f"{path}.{name}", attributes, name)
            yield from _inside(f"{path}.{name}", each, deepest - 1)


def _is_object(value: Any) -> bool:
    """Return whether a value is an object whose attributes a user may change."""
    if isinstance(value, (type, nn.Module, Tensor, FunctionType)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, _NAMESPACES) or not _is_of_library(type(value))


def _is_of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _is_setting(module: nn.Module, name: str) -> bool:
    if name in _NO_PART_OF_GRAPHS:
        return False
    value = vars(module)[name]
    if name.startswith("_"):  # torch and transformers have objects of many kinds under such names
        is_simple = isinstance(value, (bool, int, float, str, FunctionType))
        cls: Any = type(module)
        is_note = name in names_in_code(cls, of_modules=False) and name not in names_in_code(cls)
        return is_simple and not is_note
    return callable(value) or is_plain(value)


@functools.cache
def names_in_code(kind: Any, of_modules: bool = True) -> frozenset[str]:
    """Return the names and texts in the code of a class and its bases, and the names of what they define.

    Their code reads no attribute of another name: trainers put such attributes on models as notes.

    Args:
        kind: the class.
        of_modules: the bases that are modules. Otherwise the others, such as the mixin of transformers that generates:
            it notes on the model how long its last cache was, and `forward` does not run it.
    """
    return _names_in([base for base in user_classes(kind) if issubclass(base, nn.Module) == of_modules])


@functools.cache
def names_in_own_code(kind: Any) -> frozenset[str]:
    """Return as `names_in_code` the names in the code of a user."""
    return _names_in(_own_classes(kind)) - _OF_ALL_MODULES


def _own_classes(kind: Any) -> list[type]:
    return [base for base in user_classes(kind) if not _is_of_library(base)]


def _functions_of(base: type) -> list[FunctionType]:
    members = [member.fget if isinstance(member, property) else member for member in vars(base).values()]
    unwrapped = [inspect.unwrap(member) for member in members if isinstance(member, FunctionType)]
    return [function for function in unwrapped if isinstance(function, FunctionType)]


def _names_in(bases: list[type]) -> frozenset[str]:
    names = {name for base in bases for name in vars(base)}
    codes = [function.__code__ for base in bases for function in _functions_of(base)]
    while codes:
        code = codes.pop()
        names.update(code.co_names, (text for text in code.co_consts if isinstance(text, str)))
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return frozenset(names)
