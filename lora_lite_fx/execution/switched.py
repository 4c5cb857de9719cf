"""What a program depends on of the switches of a model's adapters, and the passes that make it so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters.switches import Switches
from ..passes import GraphPass, LeaveOutAdapters, ScaleAdapters

Switched = tuple[tuple[str, ...] | None, tuple[tuple[str, str | float], ...]]
"""What a program depends on of the switches: the adapters that act, None for all; and those that are scaled.

Each of these stands with `NUMBER` or `ROWS`, for a coefficient that is an input; or with the coefficient, a float that
is a part of the program.
"""

NUMBER, ROWS = "number", "rows"

ALL: Switched = (None, ())


def switched_by(switches: Switches, names: Sequence[str]) -> Switched:
    """Return what a program for these switches depends on, with coefficients as inputs.

    Args:
        switches: of the model.
        names: of the adapters in its graph.
    """
    if switches.acting is None and not switches.scales:
        return ALL
    scales = switches.scales_of(names)
    return acting_of(switches, names), tuple((name, ROWS if scale.dim() else NUMBER) for name, scale in scales.items())


def acting_of(switches: Switches, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return those of the adapters that act; None if all do."""
    acting = tuple(name for name in names if switches.acts(name))
    return None if acting == tuple(names) else acting


def switch_passes(switched: Switched) -> tuple[GraphPass, ...]:
    """Return the passes that make a program for these switches of a flat graph."""
    acting, scales = switched
    passes: list[GraphPass] = [] if acting is None else [LeaveOutAdapters(acting)]
    if scales:
        inputs = {NUMBER: torch.empty((), device="meta"), ROWS: torch.empty(1, device="meta")}
        passes.append(ScaleAdapters({name: inputs[c] if isinstance(c, str) else c for name, c in scales}))
    return tuple(passes)
