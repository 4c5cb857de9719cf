"""Look private names of other libraries up, and say what happens where a release lacks one.

Each look-up names the public thing that does nearly the same, and has one of three promises for a release without it:
`needed` is an error at import, `preferred` is a slower public way, and `offered` refuses one feature when it is used.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import AdapterError
from .versions import found_version, tried_range, way_out


@dataclass(frozen=True)
class PrivateName:
    """A private name that this library uses.

    Args:
        path: where it is, such as `torch.fx.Graph()._codegen`; `()` makes an instance, whose attribute follows.
        public: the public thing that it stands in for, and why that does not do.
        without: what happens in a release that lacks it.
    """

    path: str
    public: str
    without: str


NAMES: dict[str, PrivateName] = {}
"""The private names by their paths, in the order of look-up."""


def needed(path: str, public: str) -> Any:
    """Return the value of a private name that nothing works without.

    Raises:
        ImportError: the installed release lacks it.
    """
    NAMES[path] = PrivateName(path, public, "an ImportError that names the release")
    try:
        return find(path)
    except (AttributeError, ImportError) as error:
        raise ImportError(missing(path)) from error


def preferred(path: str, public: str, otherwise: Any) -> Any:
    """Return the value of a private name, or `otherwise` where the installed release lacks it.

    Args:
        otherwise: does the same by public means, perhaps slower; or answers for a release that has no such thing.
    """
    NAMES[path] = PrivateName(path, public, "the public way")
    try:
        return find(path)
    except (AttributeError, ImportError):
        return otherwise


def offered(path: str, public: str, feature: str) -> Any:
    """Return the value of a private name; where the installed release lacks it, return a function that refuses.

    Args:
        feature: what needs the name, as the beginning of a sentence: "torch.compile with a mode".
    """
    NAMES[path] = PrivateName(path, public, f"a refusal: {feature}")
    try:
        return find(path)
    except (AttributeError, ImportError):
        message = f"{feature} needs a newer or an older release: {missing(path)}"

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(message)

    return refuse


def find(path: str) -> Any:
    """Return the value that a path names; modules on the way are imported.

    Raises:
        AttributeError, ImportError: there is none.
    """
    first, *parts = path.split(".")
    value, module = importlib.import_module(first), first
    for part in parts:
        name = part.removesuffix("()")
        module = f"{module}.{name}"
        if not hasattr(value, name) and value is not None and hasattr(value, "__path__"):
            importlib.import_module(module)
        value = getattr(value, name)
        if part.endswith("()"):
            value = value()
    return value


def missing(path: str) -> str:
    """Return the message that the installed release of a library lacks a private name."""
    library = path.partition(".")[0]
    return (
        f"lora_lite_fx uses {path}, which {library} {found_version(library)} does not have. {library}"
        f" {tried_range(library)} were tried. The way out: {way_out(library)}."
    )
