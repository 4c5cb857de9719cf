"""Run a model on tensors without data, which tells sizes and operators, and leave nothing of the run behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..compat.torch import FakeTensorMode
from .quiet_torch import failures_unlogged
from .quirks import all_quirks


@contextmanager
def without_data(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Let calls of `model` in the body compute without data.

    What it remembers of them is forgotten, its deep copies are clones, and torch logs no operator that fails.

    Args:
        model: any.
        mode: makes the tensors without data. With a `ShapeEnv`, sizes that follow from values are symbols; without, an
            operator with such sizes raises.
    """
    with failures_unlogged(), mode, all_quirks.entered(all_quirks.OF_RUNS, model, ((), {})):
        yield
