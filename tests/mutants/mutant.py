"""A mutant: the package with one condition taken out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """A change to one source file that makes some result wrong.

    Args:
        file: the source file, relative to the repository.
        text: its text that is replaced; it occurs there exactly once.
        replacement: the text in its place.
        why: what goes wrong without the condition.
        test: the test that fails then: a file of `tests/`, and after `::` its function.
    """

    file: str
    text: str
    replacement: str
    why: str
    test: str

    @property
    def occurrences(self) -> int:
        """The number of times that `text` occurs in the file; it must be 1."""
        return self.source.count(self.text)

    @property
    def source(self) -> str:
        """The file as it is."""
        return (ROOT / self.file).read_text(encoding="utf-8")

    @property
    def line(self) -> str:
        """The condition, on one line, for tables."""
        return " ".join(self.text.split())
