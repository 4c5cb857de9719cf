"""`check`: run the conformance suite on a variant, and report what it found."""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import passes
from ..adapters.bank import check_no_bank
from ..adapters.named_configs import as_adapters
from ..adapters.variant import Variant
from ..errors import AdapterError
from ..sites.finding import find_sites
from ..sites.site import Site
from .models import Attention, GatedMLP, Net, ResidualMLP, SharedLinear, ids
from .properties import ON_ONE_MODEL, PROPERTIES
from .trial import Skip, Trial

WIDTH, INNER = 64, 128
_HOMES = [
    Path(__file__).parents[1],
    Path(str(passes.__file__)).parent,
    Path(torch.__file__).parent,
    Path(os.__file__).parent,
]
LIBRARIES = ("<", *{str(path) for home in _HOMES for path in (home, home.resolve())})
"""Beginnings of the names of files that are not the user's."""


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


def check(
    variant: Variant | Sequence[Variant],
    model: nn.Module | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    inputs: tuple[Any, ...] | None = None,
    *,
    start: float | None = 1e-5,
    tolerance: float | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Run the conformance suite on a variant of your own. It takes seconds, and needs no test framework.

    Each property is looked at, also after another one has failed. Random numbers of the caller are not used up.

    Args:
        variant: a config; or several, which are put around each other.
        model: a module to check it on, whose first result is a tensor or has `logits`. Without one, two small models of
            widths 64 and 128 are used, one exported and one traced, with attention and feed-forward layers.
        example_inputs: positional arguments to export the model with; None traces it symbolically.
        inputs: positional arguments to compare results on, best of another shape; None takes the example inputs.
        start: how far outputs may be off at the start, as a multiple of the largest value. None for a variant that
            does not start as the identity.
        tolerance: how far results may be off otherwise, as a multiple of the largest value; None follows from the
            dtypes: 1e-10 in float64, 1e-5 in float32.
        skip: names of properties to leave out, as the report prints them.
        seed: of start values, and of the random changes to them.

    Returns:
        The report, which prints as one line for each property.

    Raises:
        AssertionError: a property does not hold; the message is the whole report.
        ConfigError: `variant` is not one.
        ValueError: `skip` names no property, or there are inputs without a model.
    """
    variants = [each for _, each in as_adapters(variant)]
    check_no_bank(
        variants, "check", "The way out: the config of one adapter; banks are checked when they are inserted."
    )
    names = [has.__name__ for has in PROPERTIES]
    if unknown := sorted(set(skip) - set(names)):
        raise ValueError(f"No property is named {unknown[0]}; the properties are {', '.join(names)}.")
    began = time.perf_counter()
    if model is None and (example_inputs is not None or inputs is not None):
        raise ValueError("Inputs go with a model: check(variant, model, example_inputs).")
    with torch.random.fork_rng(devices=[]):
        trials = _own_trials(variants) if model is None else [_trial(variants, model, example_inputs, inputs)]
        for trial in trials:
            trial.start, trial.tolerance, trial.seed = start, tolerance, seed
        results = [_result(has, trials) for has in PROPERTIES if has.__name__ not in skip]
    report = Report(" around ".join(map(repr, reversed(variants))), tuple(results), time.perf_counter() - began)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def _trial(variants: list[Variant], model: nn.Module, example_inputs: Any, inputs: Any) -> Trial:
    """Return the trial on a user's model."""
    given = example_inputs if inputs is None else inputs
    if given is None:
        raise ValueError("A model is checked on inputs: check(variant, model, example_inputs).")
    return Trial(variants, model, example_inputs, given)


def _own_trials(variants: list[Variant]) -> list[Trial]:
    """Return the trials on the models of this wing: exported in float64, and traced in float32."""
    torch.manual_seed(0)
    exported = Net((Attention, GatedMLP), True, False, WIDTH, INNER).double().eval()
    traced = Net((SharedLinear, ResidualMLP, ResidualMLP), False, True, WIDTH, INNER).eval()
    inputs = (ids(3, 4, seed=1),)
    trials = [
        Trial(variants, exported, (ids(2, 5),), inputs, "the exported model of widths 64 and 128"),
        Trial(variants, traced, None, inputs, "the traced model of widths 64 and 128"),
    ]
    for trial in trials:
        sites = find_sites(trial.base)
        trial.variants = [_targeted(variant, sites) for variant in variants]
    return trials


def _targeted(variant: Variant, sites: Sequence[Site]) -> Variant:
    """Return the config with targets that are there: its own, or else every linear."""
    if any(variant.selects(site) for site in sites):
        return variant
    everywhere = {"target_names": (".",), "target_roles": None, "exclude_names": (), "layers": None}
    return dataclasses.replace(variant, **everywhere, target_kinds=("linear",))  # type: ignore[arg-type]


def _result(has: Callable[[Trial], str], trials: Sequence[Trial]) -> Result:
    """Return the result of one property: all failures, or the detail of the first model that has any."""
    name, title = has.__name__, (has.__doc__ or "").split("\n")[0].rstrip(".")
    details, reasons, failures = [], [], []
    for trial in trials[-1:] if has in ON_ONE_MODEL else trials:
        try:
            details.append(has(trial))
        except Skip as reason:
            reasons.append(str(reason))
        except Exception as error:
            failures.append(f"on {trial.label}: {_told(error)}" if len(trials) > 1 else _told(error))
    if failures:
        return Result(name, title, "failed", "; ".join(failures))
    if details:
        return Result(name, title, "passed", next(filter(None, details), ""))
    return Result(name, title, "skipped", reasons[0])


def _told(error: BaseException) -> str:
    """Return what an error says, and the line of the user's that it came from."""
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    if not isinstance(error, (AssertionError, AdapterError)):
        text = f"{type(error).__name__}: {text}"
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += traceback.extract_tb(cause.__traceback__)
        cause = cause.__cause__
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    return f"{text} ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else text
