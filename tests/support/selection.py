"""Mark as `slow` what repeats a check on more models or methods, so that the everyday run stays short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

DISTINCT = frozenset(("LoRA", "DoRA", "PiSSA", "HRA", "OFT", "IA3", "VeRA", "LoKr", "Full", "AntiPaSTO"))
"""Variants of which each has another form: a branch, a scale of rows, a start from the weight, a turned input, blocks,
gates, shared tensors, an update of full rank, a replaced weight, a decomposed weight.
What is checked of every variant in the everyday run is its conformance; the other checks are made of these there."""


def is_distinct(variant: Any) -> bool:
    """Return whether a variant, by its name or its class, is one of `DISTINCT`."""
    return (variant if isinstance(variant, str) else variant.__name__) in DISTINCT


def slow_unless(everyday: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Return `values` as the parameters of a test, in which those that are not `everyday` are marked `slow`.

    Args:
        everyday: says of a value whether it is a part of the everyday run. At least one must be.
        values: the values of one parameter.

    Raises:
        TypeError: `everyday` answers something else than True or False.
        ValueError: no value is a part of the everyday run, so the test would not run at all.
    """
    values = list(values)
    answers = [everyday(value) for value in values]
    if not all(isinstance(answer, bool) for answer in answers):
        raise TypeError(
            "everyday answers True or False. A bound __eq__ may answer NotImplemented, which counts as true."
        )
    if not any(answers):
        raise ValueError("no parameter is left for the everyday run")
    pairs = zip(values, answers, strict=True)
    return [value if answer else pytest.param(value, marks=pytest.mark.slow) for value, answer in pairs]
