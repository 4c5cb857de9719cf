"""What a check found, to be read by people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_MARKS = {"passed": "passed ", "skipped": "skipped", "failed": "FAILED "}


@dataclass(frozen=True)
class Result:
    """What was found of one property.

    Args:
        name: short name of the property, as `skip` of `check` takes it.
        title: what should hold.
        outcome: whether it does.
        detail: the numbers; or why it was skipped; or what is wrong, where and by how much.
    """

    name: str
    title: str
    outcome: Literal["passed", "skipped", "failed"]
    detail: str = ""

    def __str__(self) -> str:
        because = "because " if self.outcome == "skipped" else ""
        detail = f": {because}{self.detail}" if self.detail else ""
        return f"{_MARKS[self.outcome]}  {self.name:<10}  {self.title}{detail}"


@dataclass(frozen=True)
class Report:
    """The results of `check`, one for each property; prints as one line for each.

    Args:
        variant: the config that was checked, as text.
        results: in the order in which they were found.
        seconds: what the check took.
    """

    variant: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Result, ...]:
        """The properties that do not hold."""
        return tuple(result for result in self.results if result.outcome == "failed")

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __getitem__(self, name: str) -> Result:
        """Return the result of the property called `name`."""
        return next(result for result in self.results if result.name == name)

    def __str__(self) -> str:
        outcomes = [result.outcome for result in self.results]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in _MARKS if outcome in outcomes)
        head = f"{self.variant}: {counts} in {self.seconds:.1f} s"
        return "\n".join([head, *(f"  {result}" for result in self.results)])
