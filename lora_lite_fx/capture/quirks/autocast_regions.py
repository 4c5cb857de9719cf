"""Keep regions without autocast that transformers leaves out of a run without autocast.

`maybe_autocast(device, enabled=False)` is a region where autocast is on, and nothing where it is off. A model is
captured with autocast off. In a call under autocast its graph would compute in half precision what the model does not.
Before 5.20 the position embeddings of nearly all decoders are such a region.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

REPLACED = "maybe_autocast"
"""The function, of `transformers.utils.generic`, that the files of models import by name."""


@contextmanager
def autocast_regions_kept(model: nn.Module) -> Iterator[None]:
    """Let the files of the model's classes make these regions, in this thread and in the body."""
    files = {id(file): file for module in model.modules() if (file := sys.modules.get(type(module).__module__))}
    asking = [(vars(file), vars(file)[REPLACED]) for file in files.values() if REPLACED in vars(file)]
    tracing = threading.get_ident()

    def kept(original: Any) -> Any:
        def region(device_type: str, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != tracing or device_type == "meta":
                return original(device_type, *args, **kwargs)
            return torch.autocast(device_type, *args, **kwargs)

        return region

    for names, original in asking:
        names[REPLACED] = kept(original)
    try:
        yield
    finally:
        for names, original in asking:
            names[REPLACED] = original
