"""The kinds of trials by name. A new kind is a file `trial_*.py` and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from . import draw_calls, trial_defaults, trial_models, trial_peft, trial_rows, trial_stacks, trial_starts, trial_writes
from .verdict import Trial

KINDS: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
    "calls": draw_calls.calls,
    "stacks": trial_stacks.stacks,
    "peft": trial_peft.folders,
    "rows": trial_rows.rows,
    "writes": trial_writes.writes,
    "starts": trial_starts.starts,
    "models": trial_models.models,
    "defaults": trial_defaults.defaults,
}


def script(kind: str, trial: Trial) -> str:
    """Return a script that runs a trial, fields at their defaults left out."""
    names = sorted({name.rpartition(".")[::2] for name in _classes(trial)})
    imports = "\n".join(f"from {module} import {name}" for module, name in names)
    return f"from tests.fuzz.verdict import judge\n{imports}\n\nprint(judge({code(trial)}))"


def _classes(value: Any) -> set[str]:
    """Return the qualified names of the dataclasses in a value."""
    if dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
        own = {f"{type(value).__module__}.{type(value).__qualname__}"}
        return own.union(*map(_classes, inner))
    if isinstance(value, (tuple, list)):
        return set().union(*map(_classes, value))
    return set()


def code(value: Any) -> str:
    """Return a value as code, without fields that have their defaults."""
    if isinstance(value, tuple):
        return f"({', '.join(map(code, value))}{',' * (len(value) == 1)})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if given != field.default:
            fields.append(f"{field.name}={code(given)}")
    return f"{type(value).__name__}({', '.join(fields)})"
