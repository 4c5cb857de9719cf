"""Check how a variant is declared: as a frozen dataclass, with fields that files hold."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_origin

import torch

from ..errors import ConfigError, shown


def check_class(cls: type, root: type) -> None:
    """Check that `cls` and the classes between it and `root` declare fields in the way of dataclasses.

    Raises:
        ConfigError: a class has annotations and is not a dataclass, or gives a field another default without an
            annotation. Python ignores both in silence.
    """
    for owner in cls.__mro__[: cls.__mro__.index(root)]:
        annotated = annotated_fields(owner)
        if annotated and not is_declared(owner):
            raise ConfigError(
                f"{owner.__name__} has the field {annotated[0]!r} and is not a dataclass. Write"
                f" @dataclass(frozen=True, kw_only=True) directly above class {owner.__name__}, and @register, if it is"
                " there, above that."
            )
        for field in dataclasses.fields(owner):
            name, value = field.name, vars(owner).get(field.name, field.default)
            if value is not field.default:
                raise ConfigError(
                    f"{owner.__name__} sets {name} = {shown(value)} without an annotation, which Python ignores: the"
                    f" default stays {field.default!r}. Write {name}: {type(value).__name__} = {shown(value)}."
                )


def is_declared(cls: type) -> bool:
    """Tell whether `cls` itself, and not only a class that it derives from, is a dataclass."""
    return "__dataclass_fields__" in vars(cls)


def annotated_fields(cls: type) -> list[str]:
    """Return the names that `cls` itself annotates as fields, whether or not it is a dataclass."""
    return [name for name, hint in inspect.get_annotations(cls).items() if not _is_class_variable(hint)]


def _is_class_variable(hint: Any) -> bool:
    return "ClassVar" in hint if isinstance(hint, str) else "ClassVar" in str(get_origin(hint) or hint)


def check_fields(variant: Any) -> None:
    """Check that files can hold the fields of `variant`, and that nobody can change them.

    Raises:
        ConfigError: a field cannot be written, or would come back as something else.
    """
    for field in dataclasses.fields(variant):
        name, value = f"{type(variant).__name__}: the field {field.name!r}", getattr(variant, field.name)
        if not field.init:
            raise ConfigError(
                f"{name} has init=False, so that no file could bring it back. Make it a property that follows from the"
                " other fields."
            )
        if isinstance(value, (list, dict, set)):
            raise ConfigError(
                f"{name} holds {shown(value)}, which can be changed, and a config cannot."
                f" Write a tuple{' of pairs' if isinstance(value, dict) else ''}."
            )
        if not _is_plain(value) and not (field.name == "dtype" and isinstance(value, torch.dtype)):
            raise ConfigError(
                f"{name} holds {_named(value)}, which no file can hold. A field is None, a bool, an int, a float, a"
                " str, or a tuple of these: keep a name or a number, and make the rest of it in params or forward."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _named(value: object) -> str:
    return f"the function {value.__name__}" if inspect.isroutine(value) else shown(value)
