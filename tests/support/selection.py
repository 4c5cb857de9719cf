"""Mark what repeats a check on more models or methods as `broad` or `slow`, so that the everyday run stays short."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

TYPICAL = frozenset(("LoRA", "DoRA", "OFT", "VeRA"))
"""Variants that stand for all in the everyday run: a branch, a scale of rows, a turned input, shared tensors."""

DISTINCT = TYPICAL | {"PiSSA", "HRA", "IA3", "LoKr", "Full", "AntiPaSTO"}
"""Variants of which each has another form: those of `TYPICAL`, a start from the weight, reflections, gates, an update
of full rank, a replaced weight, a decomposed weight.
Conformance and a few others are checked of all variants; most checks are made of `TYPICAL` in the everyday run, and of
these in the broad one (`conformance.representatives`)."""


def is_typical(variant: Any) -> bool:
    """Return whether a variant, by its name or its class, is one of `TYPICAL`."""
    return _name(variant) in TYPICAL


def is_distinct(variant: Any) -> bool:
    """Return whether a variant, by its name or its class, is one of `DISTINCT`."""
    return _name(variant) in DISTINCT


def broad_unless(everyday: Callable[[Any], bool], values: Iterable[Any], several: bool = False) -> list[Any]:
    """Return `values` as the parameters of a test, in which those that are not `everyday` are marked `broad`.

    Args:
        everyday: says of a value whether it is a part of the everyday run. At least one must be.
        values: the values of one parameter. Those that `slow_unless` has marked stay as they are.
        several: each value is a tuple, of one value for each of several parameters.

    Raises:
        TypeError: `everyday` answers something else than True or False.
        ValueError: no value is a part of the everyday run, so the test would not run at all there.
    """
    return _mark_unless(everyday, values, pytest.mark.broad, several)


def by_tier(variants: Iterable[Any]) -> list[Any]:
    """Return variants as the parameters of a test: `TYPICAL` run every day, `DISTINCT` are broad, the others slow."""
    return broad_unless(is_typical, slow_unless(is_distinct, variants))


def broad_after(everyday: int, values: Iterable[Any], several: bool = False) -> list[Any]:
    """Return `values` as the parameters of a test, of which the first ones are a part of the everyday run.

    Args:
        everyday: how many; the others are marked `broad`.
        values, several: as of `broad_unless`. Values that `slow_unless` has marked do not count.
    """
    return _mark_unless(_first(everyday), values, pytest.mark.broad, several)


def slow_unless(kept: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Do as `broad_unless`, with the mark `slow`: of what is not `kept` for the everyday or the broad run."""
    return _mark_unless(kept, values, pytest.mark.slow)


def slow_after(kept: int, values: Iterable[Any], several: bool = False) -> list[Any]:
    """Do as `broad_after`, with the mark `slow`: of a test that is `broad` as a whole."""
    return _mark_unless(_first(kept), values, pytest.mark.slow, several)


def _first(number: int) -> Callable[[Any], bool]:
    count = itertools.count()
    return lambda _: next(count) < number


def _mark_unless(
    kept: Callable[[Any], bool], values: Iterable[Any], mark: pytest.MarkDecorator, several: bool = False
) -> list[Any]:
    values = list(values)
    answers = [True if _is_marked(value) else kept(value) for value in values]
    if not all(isinstance(answer, bool) for answer in answers):
        raise TypeError("the answer is True or False. A bound __eq__ may answer NotImplemented, which counts as true.")
    marked = [
        value if answer else pytest.param(*(value if several else [value]), marks=mark)
        for value, answer in zip(values, answers, strict=True)
    ]
    if all(_is_marked(value) for value in marked):
        raise ValueError("no parameter is left for the everyday run")
    return marked


def _is_marked(value: Any) -> bool:
    return isinstance(value, type(pytest.param())) and bool(value.marks)


def _name(variant: Any) -> str:
    return variant if isinstance(variant, str) else str(variant.__name__)
