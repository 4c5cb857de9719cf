"""Handle models whose `forward` is replaced on the instance, as trainers do.

A graph is captured of the `forward` that the class defines. A replaced one calls it, or parts of the model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.placement import Placement
from ..capture.origins.origin import is_hugging_face
from ..errors import AdapterError

_FORWARD = ("forward", "_original_forward")
"""Attributes of instances. accelerate keeps what it replaces under the second."""


def forget_replaced_forward(model: nn.Module) -> list[str]:
    """Let the transformers models in `model`, a copy, run the `forward` of their classes.

    One that was put on an instance calls the model that it was put on, which is not the copy.

    Returns:
        The functions that were forgotten, by module and name.
    """
    forgotten = []
    for module in model.modules():
        if is_hugging_face(module):
            own, _ = (vars(module).pop(attribute, None) for attribute in _FORWARD)
            if own is not None:
                code = getattr(own, "__func__", own)
                code = getattr(code, "__code__", code)
                forgotten.append(getattr(code, "co_qualname", type(code).__name__))
    return forgotten


def warn_of_replaced_forward(model: nn.Module, forgotten: Sequence[str]) -> None:
    """Warn of functions that the user's model runs in place of its `forward`, and that its copy does not."""
    if forgotten:
        warnings.warn(
            f"forward of this {type(model).__name__} was replaced on the instance ({', '.join(forgotten)}), as trainers"
            " do; the adapted model runs the forward of its class. The way out, if the replaced one is wanted: replace"
            " it on the adapted model.",
            stacklevel=5,
        )


def check_is_whole(model: nn.Module, part: Any, placements: Sequence[Placement]) -> None:
    """Raise AdapterError if a replaced `forward` runs a part of the model and leaves out adapters beside it.

    TRL's fused head runs the model without its head, and multiplies by the weight of the head itself. `model` is the
    adapted model, and `part` is called.
    """
    outside = sorted({p.site for p in placements if not p.site.startswith(f"{part._path}.")})
    if outside and not torch.compiler.is_dynamo_compiling() and _is_called_by(vars(model)["forward"]):
        raise AdapterError(
            f"forward of {type(model).__name__} was replaced on the instance. It calls {part._path!r} alone, which"
            f" leaves out the adapter of {outside[0]!r}: trainers with a fused head read the head's frozen weight. The"
            ' way out: exclude_names=("lm_head",), or a loss of the trainer that is computed from logits.'
        )


def _is_called_by(replaced: Any) -> bool:
    """Tell whether this function, put on an instance, is on the stack."""
    code = getattr(getattr(replaced, "__func__", replaced), "__code__", None)
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
