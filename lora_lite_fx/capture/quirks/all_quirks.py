"""The list of quirks, and what a trace or a run without data enters of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import fx, nn

from ...compat.torch import FakeTensorMode
from ..quiet_torch import failures_unlogged
from . import (
    autocast_regions,
    checks_of_distributions,
    data_of_tensors,
    decisions,
    deep_copies,
    generator_of_none,
    gradients_asked,
    module_to,
    needless_masks,
    remembered_results,
    sizes_in_tensors,
)
from .quirk import Call, Quirk

OF_RUNS = (
    remembered_results.QUIRK,
    deep_copies.QUIRK,
)
"""Also entered when a model runs on tensors without data and is not traced."""

QUIRKS = (
    *OF_RUNS,
    autocast_regions.QUIRK,
    needless_masks.QUIRK,
    data_of_tensors.QUIRK,
    gradients_asked.QUIRK,
    generator_of_none.QUIRK,
    checks_of_distributions.QUIRK,
    module_to.QUIRK,
    decisions.QUIRK,
    sizes_in_tensors.QUIRK,
)
"""All, in the order in which they are entered."""


def concerning(model: nn.Module, error: Exception | None = None) -> list[Quirk]:
    """Return the quirks that concern a model: before its first trace, or after a trace that failed with `error`."""
    return [quirk for quirk in QUIRKS if quirk.concerns(model, error)]


@contextmanager
def entered(quirks: Sequence[Quirk], model: nn.Module, call: Call) -> Iterator[Callable[[fx.GraphModule], None]]:
    """Enter quirks for the body, and yield what checks the graph after it."""
    with ExitStack() as stack:
        contexts = [(quirk, stack.enter_context(quirk.entered(model, call))) for quirk in quirks]

        def check(gm: fx.GraphModule) -> None:
            for quirk, context in contexts:
                if quirk.check is not None:
                    quirk.check(context, gm)

        yield check


@contextmanager
def without_data(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Let calls of `model` in the body compute on tensors without data, and leave nothing of them behind.

    What it remembers of them is forgotten, its deep copies are clones, and torch logs no operator that fails.

    Args:
        model: any.
        mode: makes the tensors without data. With a `ShapeEnv`, sizes that follow from values are symbols; without, an
            operator with such sizes raises.
    """
    with failures_unlogged(), mode, entered(OF_RUNS, model, ((), {})):
        yield
