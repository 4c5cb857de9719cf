"""Keep regions without autocast that transformers leaves out of a run without autocast.

`maybe_autocast(device, enabled=False)` is a region where autocast is on, and nothing where it is off. A model is
captured with autocast off. In a call under autocast its graph would compute in half precision what the model does not.

Needed by nearly all decoders before transformers 5.20, whose position embeddings are such a region, and since then by
GPT-2, Nemotron, ERNIE 4.5, Phi-4 multimodal and some more: in a call under autocast, their graphs would compute in half
precision what the model does not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .quirk import ANSWERED, Call, Quirk, files_of

REPLACED = "maybe_autocast"
"""The function, of `transformers.utils.generic`, that the files of models import by name."""


def makes_regions(model: nn.Module, error: Exception | None) -> bool:
    """Tell whether a file of the model's classes imports the function."""
    return error is None and any(REPLACED in vars(file) for file in files_of(model))


@contextmanager
def autocast_regions_kept(model: nn.Module, call: Call) -> Iterator[None]:
    """Let the files of the model's classes make these regions, in this thread and in the body."""
    asking = [(vars(file), vars(file)[REPLACED]) for file in files_of(model) if REPLACED in vars(file)]
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


ANSWERED.add(REPLACED)
QUIRK = Quirk(makes_regions, autocast_regions_kept)
