"""Know the releases of other libraries that were tried, and refuse older ones when the package is imported."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import NamedTuple


class Tried(NamedTuple):
    """The releases of a library that were tried.

    Args:
        oldest, newest: the first and the last of them; newer ones are admitted, and checked name by name.
        package: its name for pip, if that is another one.
    """

    oldest: str
    newest: str
    package: str = ""


TRIED = {
    "torch": Tried("2.12", "2.15"),
    "transformers": Tried("5.12", "5.25"),
    "bitsandbytes": Tried("0.50", "0.50"),
    "optimum": Tried("0.2.7", "0.2.7", "optimum-quanto"),
}
PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
"""The oldest and the newest Python that were tried."""


def check_versions() -> None:
    """Check the releases that everything depends on, without importing them.

    Raises:
        ImportError: Python, torch or transformers is older than any release that was tried.
    """
    if sys.version_info < PYTHON:
        found, oldest, newest = (".".join(map(str, each)) for each in (sys.version_info[:3], PYTHON, NEWEST_PYTHON))
        raise ImportError(
            f"lora_lite_fx needs Python {oldest} or newer, and this is {found}. Python {oldest} to {newest} were tried."
            f" The way out: python{newest} -m venv env"
        )
    for library in ("torch", "transformers"):
        found = found_version(library)
        if found and release(found) < release(TRIED[library].oldest):
            raise ImportError(
                f"lora_lite_fx needs {library} {TRIED[library].oldest} or newer, and {found} is installed."
                f" {tried_range(library)} were tried. The way out: {way_out(library)}."
            )


def found_version(library: str) -> str:
    """Return the installed release of a library, such as "2.13.0+cpu"; empty if it is not installed."""
    try:
        return metadata.version(_package(library))
    except metadata.PackageNotFoundError:
        return ""


def tried_range(library: str) -> str:
    """Return the releases of a library that were tried, as words."""
    if (tried := TRIED.get(library)) is None:
        return ""
    return f"{tried.oldest} to {tried.newest}"


def way_out(library: str) -> str:
    """Return the command that installs a release which was tried."""
    tried = TRIED[library]
    *first, last = release(tried.newest)
    after = ".".join(map(str, (*first, last + 1)))
    return f"pip install -U lora_lite_fx, or pip install '{_package(library)}>={tried.oldest},<{after}'"


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release: (2, 13, 0) for "2.13.0+cpu", (2, 16, 0) for "2.16.0.dev20261129"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _package(library: str) -> str:
    tried = TRIED.get(library)
    return tried.package if tried and tried.package else library
