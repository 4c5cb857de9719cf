"""Each finding of the fuzzer stays as a test, and some random trials run every day."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import lora_lite_fx as llfx
from tests.fuzz import kinds, table
from tests.fuzz.campaign import Campaign, Finding
from tests.fuzz.findings import FINDINGS, known_findings
from tests.fuzz.modules import Net
from tests.fuzz.trial_calls import Calls
from tests.fuzz.verdict import Void, Wrong, judge, require_close
from tests.support.selection import broad_after

EXAMPLES = {"calls": 6, "stacks": 6, "rows": 4, "writes": 6, "starts": 6, "peft": 6, "models": 3, "defaults": 2}
"""How many random trials of each kind run: the first three every day, because the others take seconds each."""


def of_findings() -> list[Any]:
    params = []
    of_kind: Counter[str] = Counter()
    for finding in FINDINGS:
        of_kind[finding.kind] += 1
        marks = [pytest.mark.xfail(strict=True, reason="open")] if finding.is_open else []
        marks += (
            [pytest.mark.broad] if finding.kind in ("peft", "models", "defaults") or of_kind[finding.kind] > 2 else []
        )
        params.append(pytest.param(finding, marks=marks, id=finding.name.replace(" ", "_")))
    return params


@pytest.mark.parametrize("finding", of_findings())
def test_a_finding_is_mended(finding: Any) -> None:
    verdict = judge(finding.trial)
    assert not verdict.is_bad, verdict


def require_nothing_new(kind: str, seed: int, examples: int) -> None:
    campaign = Campaign(findings=known_findings())
    known = len(campaign.findings)
    campaign.run(kind, kinds.KINDS[kind](), seed, examples)
    assert not campaign.findings[known:], [kinds.script(each.kind, each.trial) for each in campaign.findings[known:]]


@pytest.mark.parametrize("kind", broad_after(3, EXAMPLES))
def test_random_trials_find_nothing_new(kind: str) -> None:
    require_nothing_new(kind, 0, EXAMPLES[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXAMPLES)
def test_more_random_trials_find_nothing_new(kind: str) -> None:
    require_nothing_new(kind, 1, 3 * EXAMPLES[kind])


# The fuzzer itself.


@dataclass(frozen=True)
class Planted:
    """A trial that is wrong if two of its numbers are large."""

    numbers: tuple[int, ...]

    def features(self) -> frozenset[str]:
        return frozenset("large" if number > 5 else str(number) for number in self.numbers)

    def check(self) -> None:
        if sum(number > 5 for number in self.numbers) >= 2:
            raise Wrong("output", "planted")
        if 4 in self.numbers:
            raise ValueError("raw")
        if 3 in self.numbers:
            raise llfx.ConfigError("refused")
        if 2 in self.numbers:
            raise Void("void")


PLANTED = st.builds(Planted, st.lists(st.integers(0, 50), max_size=6).map(tuple))


def test_a_planted_mistake_is_found_shrunk_and_counted() -> None:
    found: list[Finding] = []
    campaign = Campaign(report=found.append)
    campaign.run("planted", PLANTED, 3, 200)
    wrong = next(each for each in found if each.verdict.outcome == "WRONG")
    assert wrong.trial == Planted((6, 6))
    raw = next(each for each in found if each.verdict.outcome == "RAW")
    assert raw.trial == Planted((4,))
    assert raw.verdict.aspect == "ValueError"
    counts = campaign.counts["planted"]
    assert sum(counts.values()) <= 200
    assert all(counts[outcome] for outcome in ("equal", "refused", "WRONG", "RAW", "void"))
    assert sum(campaign.by_finding.values()) == counts["WRONG"] + counts["RAW"]
    page = table.of(campaign, 1, 3)
    assert f"| planted | {sum(counts.values())} |" in page
    assert "WRONG planted: output [large]" in page


def test_a_seed_draws_the_same_trials_again() -> None:
    one, other = Campaign(), Campaign()
    for campaign in (one, other):
        campaign.run("planted", PLANTED, 5, 50)
    assert one.counts == other.counts
    assert [each.trial for each in one.findings] == [each.trial for each in other.findings]


def test_a_script_makes_the_trial_again() -> None:
    for finding in FINDINGS:
        *before, last = kinds.script(finding.kind, finding.trial).splitlines()
        names: dict[str, Any] = {"judge": None}
        exec("\n".join(before), names)
        assert eval(last.removeprefix("print(judge(").removesuffix("))"), names) == finding.trial


def test_findings_are_told_apart() -> None:
    assert len({finding.name for finding in FINDINGS}) == len(FINDINGS)


@pytest.mark.parametrize(
    ("actual", "what"),
    [
        (torch.ones(2), ""),
        (torch.ones(3), "result"),
        (torch.ones(2, dtype=torch.float64), "result dtype"),
        (torch.tensor([1.0, 1.1]), "result"),
        (torch.tensor([1.0, torch.nan]), "result"),
        (None, "result"),
    ],
)
def test_results_are_compared_in_shape_type_and_value(actual: Any, what: str) -> None:
    expected = {"a": [torch.ones(2)]}
    if not what:
        require_close({"a": [actual]}, expected, 1e-6, "result")
        return
    with pytest.raises(Wrong) as caught:
        require_close({"a": [actual]}, expected, 1e-6, "result")
    assert caught.value.what == what


def test_an_adapter_that_is_not_the_oracles_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer would find a variant whose formula is another one."""
    assert judge(Calls(Net(("Linear",)), "traced")).outcome == "equal"
    forward = llfx.LoRA.forward
    monkeypatch.setattr(llfx.LoRA, "forward", lambda self, x, base, p: 1.001 * forward(self, x, base, p))
    assert judge(Calls(Net(("Linear",)), "traced")).outcome == "WRONG"
