"""Let distributions not check the values of their parameters, which a trace does not have.

torch.compile leaves the checks out for good. The model, with which the graph is compared, makes them.

Needed by GroupViT, which draws from a Gumbel distribution in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributions import Distribution

from ...compat.torch import validates_arguments
from .quirk import Call, Quirk, after_undecided


@contextmanager
def checks_left_out(model: nn.Module, call: Call) -> Iterator[None]:
    """Switch the checks of distributions off in the body."""
    before = validates_arguments()
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


QUIRK = Quirk(after_undecided, checks_left_out)
