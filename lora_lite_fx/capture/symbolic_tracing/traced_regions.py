"""Record `no_grad` and `autocast` regions in symbolic tracing, which leaves them out otherwise.

A graph gets the operators at the borders of a region that `passes.InlineRegions` puts there for torch.export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...compat.torch import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED, RegionMode
from ...errors import COMPILE_INSTEAD, CaptureError
from ..refusal import own_line


class RecordedRegions(RegionMode):  # type: ignore[misc]
    """Records where the modes of autograd and autocast change, as calls in the graph of `tracer`."""

    def __init__(self, tracer: fx.Tracer) -> None:
        self._tracer = tracer
        self._entered: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SET_GRAD_ENABLED:
            self._record(func, args)
        elif func is ENTER_AUTOCAST:
            self._entered.append(self._record(func, args))
            return None
        elif func is EXIT_AUTOCAST:
            self._record(func, (self._entered.pop(),))
            return None
        return func(*args, **kwargs or {})

    def _record(self, func: Any, args: Any) -> Any:
        return self._tracer.create_proxy("call_function", func, args, {})


def go_back_to_the_caller(graph: fx.Graph, without: fx.Graph, model: str) -> None:
    """Let each region of autograd end in the mode that it began in, in place.

    A trace knows the values of the modes and not whether one is the caller's. So there are two traces, which tell.

    Args:
        graph: traced in the mode with gradients.
        without: the same, traced in the mode without.
        model: the class of the model, for messages.

    Raises:
        CaptureError: the model ends without gradients; it computes a mode, or has other regions in one of the traces.
    """
    mode = caller = (True, False)  # in the two traces
    begun: list[tuple[tuple[Any, Any], fx.Node]] = []  # regions: the mode before, and the node that has it
    changes, others = (
        each.find_nodes(op="call_function", target=SET_GRAD_ENABLED, sort=True) for each in (graph, without)
    )
    if len(changes) != len(others):
        raise _left_changed(model, [*changes, *others][0])
    for node, other in zip(changes, others, strict=True):
        new = node.args[0], other.args[0]
        if begun and begun[-1][0] == new:
            node.args = (begun.pop()[1],)
        elif new == mode:
            graph.erase_node(node)
        elif new == caller:  # by functions, which need not nest
            _end(graph, begun[1:], node)
            node.args = (begun[0][1],)
            begun.clear()
        elif new[0] == new[1]:
            with graph.inserting_before(node):
                begun.append((mode, graph.call_function(torch.is_grad_enabled)))
        else:
            raise _left_changed(model, node)
        mode = new
    if begun:
        if not mode[0]:
            raise _left_changed(model, changes[-1])
        _end(graph, begun, graph.output_node())


def _left_changed(model: str, node: fx.Node) -> CaptureError:
    """Return the error for a model that does not go back to the mode that it began in; `node` sets another."""
    return CaptureError(
        f"{model} switches autograd{own_line(node.stack_trace or '')}, and does not go back to the mode of the"
        " caller, or asks for it, as a graph cannot. The way out: a region (with torch.no_grad():) that does not"
        f" depend on the caller, or {COMPILE_INSTEAD}."
    )


def _end(graph: fx.Graph, regions: list[tuple[tuple[Any, Any], fx.Node]], before: fx.Node) -> None:
    """Insert the ends of these regions, the innermost first."""
    with graph.inserting_before(before):
        for _, mode in reversed(regions):
            graph.call_function(SET_GRAD_ENABLED, (mode,))
