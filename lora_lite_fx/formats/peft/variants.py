"""All formats of PEFT, and the one of a variant."""

from __future__ import annotations

from ...adapters.variant import Variant
from ...errors import ConfigError
from .form import PeftFormat
from .methods.low_rank import LOW_RANK
from .methods.matrices import MATRICES
from .methods.rotations import ROTATIONS
from .methods.shared_bases import SHARED_BASES

FORMATS = (*LOW_RANK, *ROTATIONS, *MATRICES, *SHARED_BASES)


def format_of(variant: Variant) -> PeftFormat:
    """Return how PEFT writes `variant`.

    Raises:
        ConfigError: PEFT does not have it.
    """
    for form in FORMATS:
        fixed = all(getattr(variant, name, None) == value for name, value in form.fixed.items())
        if form.variant is type(variant) and fixed:
            return form
    raise ConfigError(f"PEFT has no method that computes {type(variant).__name__}.")
