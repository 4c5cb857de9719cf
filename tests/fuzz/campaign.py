"""Run many random trials of a kind, attribute what fails to findings, and shrink the first trial of each finding."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given
from hypothesis import strategies as st

from .verdict import Trial, Verdict, judge

EXAMPLES = 25
"""How many trials a seed stands for. Hypothesis begins with small ones."""

SHRINKING = 20.0
"""For how many seconds of the processor the first trial of a finding is shrunk."""


@dataclass(frozen=True)
class Finding:
    """A way to be wrong, named by the smallest trial that shows it.

    Args:
        kind: of the trial.
        trial: the smallest.
        verdict: what became of it.
        seed: which found it.
    """

    kind: str
    trial: Trial
    verdict: Verdict
    seed: int = 0

    @property
    def name(self) -> str:
        """The finding in words: the kind of trial, what is wrong, and what the smallest trial consists of."""
        return f"{self.kind}: {self.verdict.aspect} [{' + '.join(sorted(self.trial.features()))}]"

    def explains(self, kind: str, trial: Trial, verdict: Verdict) -> bool:
        """Return whether a failing trial has all that this finding's smallest trial consists of."""
        return kind == self.kind and self._is_alike(verdict) and self.trial.features() <= trial.features()

    def _is_alike(self, verdict: Verdict) -> bool:
        mine = self.verdict
        return mine.outcome == verdict.outcome and (mine.outcome == "WRONG" or mine.aspect == verdict.aspect)


@dataclass
class Campaign:
    """The counts and findings of a run.

    Args:
        findings: those that are known before it begins; new ones are added.
        deadline: when to stop, by `time.monotonic`; None for never.
        report: is called with each new finding.
    """

    findings: list[Finding] = field(default_factory=list)
    deadline: float | None = None
    report: Callable[[Finding], None] = lambda finding: None
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    by_finding: Counter[str] = field(default_factory=Counter)

    def is_over(self) -> bool:
        """Return whether the time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def run(self, kind: str, trials: st.SearchStrategy[Any], seed: int, examples: int = EXAMPLES) -> None:
        """Run the trials of one seed, count them, and shrink those that no finding explains."""
        verdicts: dict[str, Verdict] = {}
        failed: list[Trial] = []

        def verdict_of(trial: Trial) -> Verdict:
            if (key := repr(trial)) not in verdicts:
                verdicts[key] = judge(trial)
            return verdicts[key]

        def look(trial: Trial) -> None:
            if self.is_over():
                return
            is_new = repr(trial) not in verdicts
            verdict = verdict_of(trial)
            if is_new:
                self.counts.setdefault(kind, Counter())[verdict.outcome] += 1
                if verdict.is_bad:
                    failed.append(trial)

        _explore(look, trials, seed, examples, shrinks=False)
        for trial in failed:
            verdict = verdict_of(trial)
            finding = self._finding_of(kind, trial, verdict)
            if finding is None:
                fails = functools.partial(self._fails, kind, verdict, verdicts, time.process_time() + SHRINKING)
                smallest = shrunk(fails, trials, seed, examples) or trial
                finding = Finding(kind, smallest, verdict_of(smallest), seed)
                self.findings.append(finding)
                self.report(finding)
            self.by_finding[finding.name] += 1

    def _fails(self, kind: str, of: Verdict, verdicts: dict[str, Verdict], until: float, trial: Trial) -> bool:
        """Return whether a trial fails like another one, and in a way that no finding explains yet."""
        if (key := repr(trial)) not in verdicts:
            if time.process_time() > until:
                return False
            verdicts[key] = judge(trial)
        now = verdicts[key]
        is_alike = (now.outcome, now.aspect) == (of.outcome, of.aspect)
        return is_alike and self._finding_of(kind, trial, now) is None

    def _finding_of(self, kind: str, trial: Trial, verdict: Verdict) -> Finding | None:
        return next((each for each in self.findings if each.explains(kind, trial, verdict)), None)


class _Failed(Exception):
    """A trial fails in the way that is shrunk."""


def shrunk(fails: Callable[[Trial], bool], trials: st.SearchStrategy[Any], seed: int, examples: int) -> Trial | None:
    """Return the smallest trial that fails, which Hypothesis finds from the first one that this seed draws."""
    last: list[Trial] = []

    def look(trial: Trial) -> None:
        if fails(trial):
            last.append(trial)
            raise _Failed

    try:
        _explore(look, trials, seed, examples, shrinks=True)
    except _Failed:
        return last[-1]  # Hypothesis runs the smallest one last
    return None


def _explore(
    look: Callable[[Trial], None], trials: st.SearchStrategy[Any], seed: int, examples: int, shrinks: bool
) -> None:
    settings = hypothesis.settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    hypothesis.seed(seed)(settings(given(trials)(look)))()
