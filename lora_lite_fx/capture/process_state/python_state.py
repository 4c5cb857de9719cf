"""See what a call of a model changes in Python: in modules, objects that they hold, their classes and their files.

A graph has no such state: what it reads is a constant, and what the model changes stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...compat.torch_modules import MODULES, REGISTRIES
from ...errors import COMPILE_INSTEAD

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS = (list, tuple, dict, set)
_OF_ALL_MODULES = vars(nn.Module()).keys() - {"training"}
_ABSENT: Any = object()
_DEEPEST, _LONGEST = 2, 100
"""How far containers are looked into, and how long they may be; of others, only the object itself is compared."""
_NOT_OF_THE_MODEL = {*sys.stdlib_module_names, "torch", __name__.partition(".")[0]}
"""The packages whose classes and files are no part of a model."""


@dataclass(frozen=True)
class _Holder:
    """Something with state.

    Args:
        path: goes before the names, with a dot.
        owner: a class, or the mapping that has its values by name.
        source: the classes or files whose code may change them, for messages.
    """

    path: str
    owner: Any
    source: tuple[Any, ...]

    def read(self) -> dict[str, Any]:
        """Return its values by name."""
        return dict(vars(self.owner) if isinstance(self.owner, type) else self.owner)

    def values(self) -> dict[str, Any]:
        """Return copies of the values that are state, by name."""
        return {name: _copied(value) for name, value in self.read().items() if self.has(name, value)}

    def put_back(self, name: str, now: Any, was: Any) -> None:
        """Give it a value that it had before, or none."""
        if isinstance(self.owner, type):
            delattr(self.owner, name) if was is _ABSENT else setattr(self.owner, name, _contents_put_back(now, was))
        elif was is _ABSENT:
            del self.owner[name]
        else:
            self.owner[name] = _contents_put_back(now, was)

    def has(self, name: str, value: Any) -> bool:
        """Tell whether a value is state: anything of a module or an object in one, numbers and the like elsewhere."""
        if self.path:
            return name not in _OF_ALL_MODULES
        return not name.startswith("__") and _is_plain(value)


def _own_classes(instance: object) -> tuple[type, ...]:
    return _own_among(type(instance).__mro__)


@functools.lru_cache(maxsize=256)  # the modules of a model are of few classes
def _own_among(classes: tuple[type, ...]) -> tuple[type, ...]:
    return tuple(kind for kind in classes if kind.__module__.partition(".")[0] not in _NOT_OF_THE_MODEL)


def _held_objects(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """Yield the objects of classes of a user that modules have as attributes, each once: name, object and module."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if hasattr(value, "__dict__") and _own_classes(value) and not isinstance(value, (type, nn.Module, Tensor)):
                if id(value) not in seen:
                    yield f"{path}.{name}".lstrip("."), value, module
                seen.add(id(value))


def _holders(model: nn.Module) -> Iterator[_Holder]:
    kinds: dict[type, None] = {}
    for name, module in model.named_modules():
        own = _own_classes(module)
        kinds |= dict.fromkeys(own)
        registries = [vars(module)[registry] for registry in REGISTRIES if registry != MODULES]
        for values in (vars(module), *registries):
            yield _Holder(f"{name}." if name else "self.", values, own)
    for path, held, module in _held_objects(model):
        own = (*_own_classes(held), *_own_classes(module))
        kinds |= dict.fromkeys(own)
        yield _Holder(f"{path}.", vars(held), own)
    for kind in kinds:
        yield _Holder("", kind, (kind,))
    for file in dict.fromkeys(kind.__module__ for kind in kinds):
        if (code := sys.modules.get(file)) is not None:
            yield _Holder("", vars(code), (code,))


@dataclass(frozen=True)
class Change:
    """A value that is another one than before.

    Args:
        name: where it is.
        was, now: the values.
        sources: the classes or files whose code may change it.
    """

    name: str
    was: Any
    now: Any
    sources: tuple[Any, ...]

    @property
    def line(self) -> str:
        """The line that seems to change it, for messages, after a space; empty if none is found."""
        return _line_of(self.name.rpartition(".")[2], self.sources)

    @property
    def is_count(self) -> bool:
        """Whether it is a number or text, or a container that grows: not what a call notes of its tensors."""
        if type(self.now) in _CONTAINERS and type(self.was) is type(self.now):
            return len(self.was) != len(self.now)
        return type(self.now) in _PLAIN


class PythonState:
    """The state of a model at one time, to be compared with what it is later.

    Args:
        model: a copy of the user's, over classes that are the user's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._were = [(holder, holder.values()) for holder in _holders(model)]

    def changes(self) -> list[Change]:
        """Return what is another value now than before."""
        return [
            Change(f"{holder.path}{name}".removeprefix("self."), was, now, holder.source)
            for holder, name, was, now in self._changes()
        ]

    def restore(self, where: Callable[[Any], bool] = lambda now: True) -> None:
        """Put back what was there before, in the place of those values of now for which `where` is true."""
        for holder, name, was, now in list(self._changes()):
            if where(now):
                holder.put_back(name, now, was)

    def _changes(self) -> Iterator[tuple[_Holder, str, Any, Any]]:
        for holder, were in self._were:
            values = holder.read()
            for name in {**were, **values}:
                was, now = were.get(name, _ABSENT), values.get(name, _ABSENT)
                if not _is_same(was, now) and (now is _ABSENT or holder.has(name, now)):
                    yield holder, name, was, now


@contextmanager
def state_put_back(model: nn.Module) -> Iterator[PythonState]:
    """Yield the state of a model, and put it back after the body."""
    state = PythonState(model)
    try:
        yield state
    finally:
        state.restore()


def _is_plain(value: Any, deepest: int = _DEEPEST) -> bool:
    if type(value) not in _CONTAINERS or not deepest or len(value) > _LONGEST:
        return type(value) in _PLAIN or isinstance(value, Tensor)
    items = (*value, *value.values()) if type(value) is dict else value
    return all(_is_plain(item, deepest - 1) for item in items)


def _copied(value: Any, deepest: int = _DEEPEST) -> Any:
    if type(value) not in _CONTAINERS or not deepest or len(value) > _LONGEST:
        return value
    if type(value) is dict:
        return {key: _copied(item, deepest - 1) for key, item in value.items()}
    return type(value)(_copied(item, deepest - 1) for item in value)


def _is_same(was: Any, now: Any) -> bool:
    if was is now:
        return True
    if type(was) is not type(now):
        return False
    if type(was) in _CONTAINERS and len(was) != len(now):
        return False
    if type(was) is dict:
        return was.keys() == now.keys() and all(_is_same(item, now[key]) for key, item in was.items())
    if type(was) in (list, tuple):
        return all(map(_is_same, was, now))
    if type(was) is float and math.isnan(was):
        return math.isnan(now)
    return type(was) in (*_PLAIN, set) and bool(was == now)


def _contents_put_back(now: Any, was: Any) -> Any:
    """Return the object of now, a container, with the contents of before: others may hold it. Else what was before."""
    was = _copied(was)
    if type(now) is not type(was) or type(was) not in (list, dict, set):
        return was
    now.clear()
    (now.extend if type(was) is list else now.update)(was)
    return now


def _line_of(name: str, sources: tuple[Any, ...]) -> str:
    """Return the first line of these classes or files, outside of `__init__`, that seems to change the name."""
    changed = re.compile(
        rf"\b{re.escape(name)}\b\s*(\[.*\]\s*)?([-+*/|&^%@]|//|\*\*|>>|<<)?=[^=]|\b{re.escape(name)}\.\w+\("
    )
    for source in sources:
        try:
            lines, first = inspect.getsourcelines(source)
            file = inspect.getsourcefile(source)
        except (OSError, TypeError):  # there is no file
            continue
        method = ""
        for number, line in enumerate(lines, max(first, 1)):
            if begun := re.match(r"\s*(?:async )?def (\w+)", line):
                method = begun[1]
            if method not in ("", "__init__") and line[:1].isspace() and changed.search(line):
                return f" at `{line.strip()}` ({file}:{number})"
    return ""


def new_parameter(model: nn.Module, known: Sequence[nn.Parameter]) -> str:
    """Return what a call has made if `model` has a parameter that is none of those known; empty if it has not."""
    before = set(map(id, known))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in before:
                owner, _, part = path.rpartition(".")
                line = _line_of(name, _own_classes(module)) or _line_of(part, _own_classes(model.get_submodule(owner)))
                made = f"{path}.{name}".lstrip(".")
                return (
                    f"makes its parameter {made} in the first call{line}, and a graph would make it anew in each. The"
                    " way out: call the model once before it is captured."
                )
    return ""


def warn_of_count(model: nn.Module, change: Change) -> None:
    """Warn of a value that the model changes in each call, although two calls in a row compute the same."""
    warnings.warn(
        f"{type(model).__name__} changes {change.name} in each call{change.line}, and its graph does not. Two calls in"
        " a row compute the same. If a later one does not, as after some number of calls, the graph computes something"
        f" else than the model. The way out then: {COMPILE_INSTEAD}.",
        stacklevel=2,
    )
