"""Raise the bounds of tests/constraints.txt to the releases of this environment, as `.ci/run raise` does at its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

CONSTRAINTS = Path(__file__).resolve().parents[1] / "tests" / "constraints.txt"


def raised(constraints: str, installed: Callable[[str], str | None]) -> str:
    """Return the constraints with each bound at the installed release, where that is newer than the bound."""

    def bound(line: re.Match[str]) -> str:
        newest = max(Version(line["bound"]), Version(installed(line["name"]) or "0"))
        return f"{line['name']}<={newest.public}"

    return re.sub(r"^(?P<name>[\w.-]+)<=(?P<bound>\S+)", bound, constraints, flags=re.MULTILINE)


def installed_version(name: str) -> str | None:
    """Return the release of a package in this environment, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    CONSTRAINTS.write_text(raised(CONSTRAINTS.read_text(encoding="utf-8"), installed_version), encoding="utf-8")
