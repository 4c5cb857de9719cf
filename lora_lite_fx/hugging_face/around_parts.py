"""Call a model around the graphs of its parts, where a graph cannot compute the loss.

The loss of a transcription depends on how long each text is, and that of a detector on which boxes are nearest. The
model's own `forward` computes such a loss. The parts that it calls run graphs of their own, and so do modules with
adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.placement import Placement
from ..capture.comparable import revealed
from ..capture.differences import agree
from ..capture.origins.origin import is_hugging_face
from ..errors import CaptureError
from ..execution.layer_modules import plain_class
from ..graph.calls_and_traces import tracing
from ..graph.modes import in_mode
from ..log import logger


def has_parts(model: nn.Module, part: Any, placements: Sequence[Placement]) -> bool:
    """Tell whether each adapter is in a module, which runs a graph of its own when a model's own code calls it."""
    modules = dict(model.named_modules())
    return is_hugging_face(part) and all(placement.site in modules for placement in placements)


def run_around_parts(part: Any, arguments: dict[str, Any], return_dict: bool) -> Any:
    """Run the `forward` that the class of a model defines, on the adapted model."""
    return plain_class(type(part)).forward(part, **arguments, return_dict=return_dict)


def try_around_parts(part: Any, arguments: dict[str, Any], return_dict: bool, reason: CaptureError) -> Any:
    """Run a call with labels that cannot be captured around the parts, and say so in the log.

    Raises:
        CaptureError: `reason`, for which no graph can compute the call, if a part cannot be captured either, or if the
            parts are not all that counts.
    """
    try:
        if not _computes_the_same(part, arguments):
            raise reason from reason.__cause__
        result = run_around_parts(part, arguments, return_dict)
    except CaptureError:
        raise reason from reason.__cause__
    logger.info(
        "%s: calls with labels run its own forward around graphs of its parts, because no graph has their loss: %s",
        type(part).__name__,
        str(reason).partition("\n")[0],
    )
    return result


def _computes_the_same(part: Any, arguments: dict[str, Any]) -> bool:
    """Tell whether the model has, around its parts, the results of its graph without labels.

    A module may read the weight of another one in place of calling it, as `nn.MultiheadAttention` does, and leave out
    the adapter of that.
    """
    # Without dropout, and with adapters that do something, which start at zero. No other call may see them meanwhile.
    with tracing(), torch.no_grad(), in_mode(part, False), revealed(part):
        around = run_around_parts(part, arguments, return_dict=True)
        whole = part(**{name: value for name, value in arguments.items() if name != "labels"}, return_dict=True)
    tensors = [name for name, value in whole.items() if isinstance(value, Tensor)]
    return bool(tensors) and all(agree(around.get(name), whole[name]) for name in tensors)
