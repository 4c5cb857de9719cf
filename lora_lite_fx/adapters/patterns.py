"""Regular expressions that are searched in names, with bounded work.

They may come from a file of a stranger, and Python's `re` can be made to run for years by a short expression. Package
`regex` stops after a given time. What an expression means is said by `re`: one that the two read in different ways is
not taken.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

from ..errors import ConfigError, shown

SECONDS = 2.0
"""The time that the patterns of one field may take beyond what ordinary ones do. Those take some microseconds."""

_ORDINARY = 0.005  # seconds for one name; time below this does not count
_READ_DIFFERENTLY = re.compile(r"(?<!\\)(?:\\\\)*(?:\{(?!\d*(?:,\d*)?\})|\[:)")


def check_pattern(pattern: object) -> None:
    """Check that `pattern` is a regular expression, as `re` reads them.

    Raises:
        ValueError: it is not, and the message says why.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{pattern!r} is not a regular expression: it must be a string")
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown(pattern)} is not a regular expression: {error}") from error
    if _READ_DIFFERENTLY.search(pattern):
        raise ValueError(
            f"{shown(pattern)} has a {{ that does not begin a repetition, or a [:, which are read in several ways:"
            r" write \{ or [\:"
        )


def occurs(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the patterns occurs in `name`.

    Raises:
        ConfigError: the patterns take too long.
    """
    return first_occurring(patterns, name) is not None


def first_occurring(patterns: Iterable[str], name: str) -> int | None:
    """Return the index of the first pattern that occurs in `name`; None if none does.

    Args:
        patterns: regular expressions, which `check_pattern` has checked.
        name: a qualified name.

    Raises:
        ConfigError: the patterns take too long.
    """
    return _search(tuple(patterns)).first(name)


class _Search:
    """The search for the patterns of one field, which remembers its results and the time that it took."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self.seconds_left = SECONDS
        self.results: dict[str, int | None] = {}

    def first(self, name: str) -> int | None:
        if name in self.results:
            return self.results[name]
        began = time.thread_time()  # not the time of the wall, because other processes may hold this one up
        try:
            found = (
                index
                for index, pattern in enumerate(self.patterns)
                if self._occurs(pattern, name, self.seconds_left - (time.thread_time() - began))
            )
            self.results[name] = next(found, None)
            return self.results[name]
        finally:
            took = time.thread_time() - began
            self.seconds_left -= took if took > _ORDINARY else 0

    def _occurs(self, pattern: str, name: str, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            if seconds > 0:
                return _compiled(pattern).search(name, timeout=seconds) is not None
        raise ConfigError(
            f"The pattern {shown(pattern)} takes too long to be searched in {shown(name)}: repetitions of alternatives"
            " or of repetitions, such as (a|aa)+ or (a+)+, can be matched in very many ways. Write one that matches in"
            " one way, such as a+."
        )


_search = lru_cache(maxsize=512)(_Search)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern, regex.VERSION0)
