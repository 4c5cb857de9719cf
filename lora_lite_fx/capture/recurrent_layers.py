"""Tell of the length that torch.export fixes in a model with recurrent layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx

from ..graph.modes import owner_of

_OPERATORS = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
_SAYS = "torch.export records {}, a recurrent layer, for the {} steps of its example"


def fixed_length(graph: fx.Graph) -> tuple[int, str] | None:
    """Return the number of steps for which a recurrent layer is recorded, and a clause that says so.

    Return None if `graph` has no such layer, or leaves the number open.
    """
    for operator in _OPERATORS:
        for node in graph.find_nodes(op="call_function", target=operator):
            x: Any = node.args[0]
            batch_first, value = node.args[-1], x.meta.get("val")
            # A size that became fixed during the trace is a SymInt that is shown as a number.
            if value is not None and (steps := str(value.shape[-2 if batch_first else 0])).isdigit():
                path = owner_of(node)
                return int(steps), _SAYS.format(repr(path) if path else node.name, steps)
    return None


def warn_of_fixed_length(graph: fx.Graph) -> None:
    """Warn of a length that is fixed, once for a capture.

    Warns:
        UserWarning: a recurrent layer is recorded for the length of the example.
    """
    if fixed := fixed_length(graph):
        warnings.warn(
            f"{fixed[1]}: the graph takes no other length. The way out: pad to this length; or pass no example_inputs,"
            " because symbolic tracing leaves the length open.",
            stacklevel=10,
        )
