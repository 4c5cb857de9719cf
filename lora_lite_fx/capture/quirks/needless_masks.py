"""Make no mask in a trace where transformers makes none in other calls: without padding, where each token sees all.

transformers makes one wherever it is exported, because a mask that is given may be another in other calls. Informer
shortens its sequence between layers, which a mask of the first length does not fit. Other encoders would add a mask of
zeros in each call, and not get the fast operators of attention.

Needed by Informer, which cannot be captured without; and by all other encoders, which would be slower.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .quirk import Call, Quirk, files_of

MAKERS = ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")
"""The functions of transformers by which models make such masks."""


def makes_masks(model: nn.Module, error: Exception | None = None) -> bool:
    """Tell whether `model` makes masks in which tokens see those behind them, by its code or by its config."""
    if error is not None or "transformers.masking_utils" not in sys.modules:
        return False
    configs = (getattr(module, "config", None) for module in model.modules())
    by_config = any(getattr(config, "is_causal", True) is False for config in configs)
    return by_config or any(hasattr(file, maker) for file in files_of(model) for maker in MAKERS)


@contextmanager
def needless_masks_left_out(model: nn.Module, call: Call) -> Iterator[None]:
    """Let transformers make no mask in the body where it is given none and each token sees all, as in other calls.

    Safe for other threads, because their calls make none either. A mask that is given is made, because calls may have
    other values. Where a release has no such function, masks are made, and a graph is slower and computes the same.
    """
    masks = sys.modules["transformers.masking_utils"]
    from ...compat.transformers import MASK_QUESTION

    decide = getattr(masks, MASK_QUESTION, None)
    if decide is None:
        yield
        return

    def is_needless(padding_mask: Any, kv_length: Any, local_attention_size: Any = None) -> Any:
        if padding_mask is None and local_attention_size is None:
            return True
        return decide(padding_mask, kv_length, local_attention_size)

    vars(masks)[MASK_QUESTION] = is_needless
    try:
        yield
    finally:
        vars(masks)[MASK_QUESTION] = decide


QUIRK = Quirk(makes_masks, needless_masks_left_out)
