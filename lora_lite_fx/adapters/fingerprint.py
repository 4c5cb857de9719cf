"""Fingerprint the source of a variant, so that no graph or file is run with another `forward` than it was made with.

The fingerprint is a hash of texts: the source of `forward`, and of the methods and the functions of the same package
that it names, and constants. Other values count by their type alone. A changed comment counts as a change.

The source of a function is read once, at the latest when the variant is registered or first used: an edit of the file
after that is not taken for the code that runs. Where there is no source, as in a plain Python prompt, the fingerprint
tells one class from another in this process only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import tokenize
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

TEXT = "text"
_OURS = __name__.partition(".")[0]
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def code_fingerprint(cls: type) -> dict[str, str] | None:
    """Return the hash of the code that computes `forward`, under `text`; or under a name of its own without source.

    Variants of this package have none. Their maths is fixed by tests and by other libraries' files, and a version that
    writes it in another way must not make old files unreadable.
    """
    if _top(cls.__module__) == _OURS:
        return None
    try:
        return {TEXT: hashlib.sha256("\n".join(_parts(cls)).encode()).hexdigest()[:16]}
    except OSError:  # inspect has no source
        return {_name_in_this_process(cls): ""}


def is_same_code(first: Mapping[str, str], second: Mapping[str, str]) -> bool | None:
    """Return whether two fingerprints are of the same code; None if that cannot be told.

    It cannot be told without source, nor of files that earlier versions wrote, which hashed syntax trees and bytecode.
    """
    common = first.keys() & second.keys()
    return all(first[kind] == second[kind] for kind in common) if common else None


def _parts(cls: type) -> Iterator[str]:
    """Yield the source of `forward` and of the functions that it reads, and the constants that these read."""
    package = _top(cls.__module__)
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    classes = [vars(base) for base in cls.__mro__[:-1] if _top(base.__module__) != _OURS]
    waiting = [("forward", owner["forward"]) for owner in classes if "forward" in owner]
    seen: set[FunctionType] = set()
    for name, value in waiting:
        function = _function_of(value)
        if not isinstance(function, FunctionType) or _top(function.__module__) != package:
            yield f"{name} = {_constant(value)}"
        elif function not in seen:
            seen.add(function)
            yield _source(function.__code__)
            yield f"defaults = {_constant((function.__defaults__, function.__kwdefaults__))}"
            names = _names(function.__code__)
            outside = {**function.__globals__, **_enclosed(function)}
            for each in names:
                if each in outside:
                    waiting += _read(each, outside[each], names, package)
                if each not in fields:
                    waiting += [(each, owner[each]) for owner in classes if each in owner]


def _read(name: str, value: Any, names: list[str], package: str) -> list[tuple[str, Any]]:
    """Return a value from outside the class; of a module or class of the same package what code reads of it."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if isinstance(value, (ModuleType, type)) and _top(module) == package:
        return [(each, vars(value)[each]) for each in names if each in vars(value)]
    return [(name, value)]


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """Return what a function encloses. `super()` puts the class itself into a cell."""
    enclosed: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # of a cell that is not filled yet
            enclosed |= {name: cell.cell_contents} if name != "__class__" else {}
    return enclosed


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _function_of(value: Any) -> Any:
    """Return the function of a method or property as a class holds it; any other value as it is."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, functools.cached_property) else value


def _constant(value: object) -> str:
    """Return a constant as text that is the same in each process; for another value its type."""
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_constant, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    if isinstance(value, Mapping):
        return _constant(list(value.items()))
    if isinstance(value, functools.partial):
        return _constant([value.func, value.args, value.keywords])
    if type(value) is Tensor and value.device.type != "meta":
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, ModuleType):
        return value.__name__
    named = value if isinstance(value, (FunctionType, type)) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


@functools.cache  # the file that the code is from may be edited while it runs
def _source(code: CodeType) -> str:
    try:
        return inspect.getsource(code)
    except (SyntaxError, tokenize.TokenError) as error:  # another text stands where the code is said to be from
        raise OSError(f"no source of {code.co_name}") from error


@functools.cache
def _names(code: CodeType) -> list[str]:
    """Return the names of globals and attributes that `code` reads, with the functions inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted({*code.co_names, *code.co_freevars}.union(*inner))


@functools.cache
def _name_in_this_process(cls: type) -> str:
    return f"no source {uuid.uuid4().hex}"
