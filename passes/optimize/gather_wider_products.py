"""Gather the products of low-rank adapters that are wider than their base, with those of their sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..pipeline import Program
from .gather_products import GatherProducts


@dataclass(frozen=True)
class GatherWiderProducts(GatherProducts):
    """Make one operation of products and sums where the adapter is wider than the base, as float32 beside bfloat16.

    The operation casts the input itself, and saves it as narrow as it is. Of DoRA it saves the result, and not the sum
    in float32. Safe for the reasons of `GatherProducts`, and because the sum is rounded once, as before. In inference,
    where one token waits for calls and not for memory, the plain operators are quicker.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training", "checkpointed"})
    casts: ClassVar[bool] = True
