"""Keep the graphs of a model in the order of their use, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch

from ..log import logger
from .captured_call import CapturedCall, CapturedGraph


class KeptGraphs:
    """The graphs of a model, the one that was not used for longest first.

    Args:
        name: of the model, for the log.
        limit: the most graphs to keep of the model, and of each part of it that is called by itself.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._graphs: list[CapturedGraph] = []
        self._as_captured: list[CapturedGraph] = []  # in that order, which no call changes
        self._lock = threading.Lock()  # for their order, which calls change

    def __iter__(self) -> Iterator[CapturedGraph]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def modules(self) -> tuple[torch.fx.GraphModule, ...]:
        """Return the graph modules, in the order of their use."""
        with self._lock:
            return tuple(graph.gm for graph in self._graphs)

    def find(self, call: CapturedCall) -> tuple[CapturedGraph | None, str]:
        """Return the graph that holds for this call, or None and the reason why a graph of its signature does not."""
        if torch.compiler.is_dynamo_compiling():  # Dynamo guards the list, and would compile anew for each order
            return _first(self._as_captured, call)
        with self._lock:
            graph, reason = _first(reversed(self._graphs), call)
            if graph is not None:
                self._graphs.remove(graph)
                self._graphs.append(graph)
        return graph, reason

    def add(self, graph: CapturedGraph, reason: str = "", seconds: float | None = None) -> None:
        """Keep a graph; at the limit, drop the one of the same part that was not used for longest, with a warning.

        Args:
            graph: is the last one from now on.
            reason: why the graphs of the same signature do not hold for its call.
            seconds: what the capture took, to be logged; None says nothing.
        """
        call = graph.call
        same = [kept for kept in self._graphs if kept.call.path == call.path]
        name = self._name + (f".{call.path}" if call.path else "")
        if seconds is not None:
            changes = [call.differs_from(kept.call) for kept in same]
            reason = reason or "; ".join(min(changes, key=len)[:3] if changes else ["the first call"])
            logger.info("%s: captured a graph in %.1f s (%s)", name, seconds, reason)
        if len(same) == self._limit:
            self._graphs.remove(same[0])
            self._as_captured.remove(same[0])
            logger.warning(
                "%s: dropped the graph that was not used for longest, of %d (max_graphs); a call like its own"
                " (%s) will capture it again",
                name,
                self._limit,
                ", ".join(same[0].call.normalized.arguments),
            )
        self._graphs.append(graph)
        self._as_captured.append(graph)


def _first(graphs: Iterable[CapturedGraph], call: CapturedCall) -> tuple[CapturedGraph | None, str]:
    """Return the first graph that holds for this call; or None, and why the last of its signature does not."""
    signature, reason = call.signature, ""
    for graph in graphs:
        if graph.call.signature == signature:
            reason = graph.refuses(call.leaves)
            if not reason:
                return graph, ""
    return None, reason
