"""Operations with two forms: plain operators, which every tool knows, and a fast function, which training runs.

A call of such an operation is a few plain operators in a graph. The last of them is marked with the name of the
operation and with the operators that make it, so that `marked_call` finds the call again, and knows if a pass has
changed it since.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from ..compat.torch import graph_of_trace
from .walk import ancestors

_KEY = "lora_lite_fx_operation"

F = TypeVar("F", bound=Callable[..., Tensor])

_fast_forms: dict[str, Callable[..., Any]] = {}
"""The fast form of each operation, by its name."""


def with_fast_form(fast: Callable[..., Any]) -> Callable[[F], F]:
    """Make an operation of a function of tensors that computes it by plain operators.

    The function reads its operands in their order, and takes tensors alone. Its name is that of the operation: another
    formula is another name, because graphs in files have the name.

    Args:
        fast: computes the same, to rounding, in less time or memory.
    """

    def decorate(plain: F) -> F:
        name = plain.__name__
        _fast_forms[name] = fast

        @functools.wraps(plain)
        def operation(*operands: Tensor) -> Tensor:
            graph = graph_of_trace()
            if graph is None:
                return plain(*operands)
            before = set(graph.nodes)
            result = plain(*operands)
            _mark(graph, before, name, len(operands))
            return result

        return operation  # type: ignore[return-value]

    return decorate


def repeatable(function: F) -> F:
    """Say of a function that it computes the same from the same operands, and has no other effect."""
    function.is_repeatable = True  # type: ignore[attr-defined]
    return function


class MarkedCall(NamedTuple):
    """A call of an operation with two forms.

    Args:
        fast: the fast form.
        operands: what it is called with.
        members: the nodes of the plain operators, the last of which has the result.
    """

    fast: Callable[..., Any]
    operands: list[fx.Node]
    members: list[fx.Node]


def marked_call(result: fx.Node) -> MarkedCall | None:
    """Return the call whose result `result` is; None if it is not one, or if its operators are not as they were."""
    mark = (result.meta.get("custom") or {}).get(_KEY)
    if mark is None or mark["name"] not in _fast_forms:
        return None
    lines = mark["lines"]
    nodes: dict[int, fx.Node] = {len(lines) - 1: result}
    for place in reversed(range(len(lines))):
        if not _agree(lines[place], _line(nodes[place]), nodes):
            return None
    operands = [nodes[place] for place in sorted((place for place in nodes if place < 0), reverse=True)]
    return MarkedCall(_fast_forms[mark["name"]], operands, [nodes[place] for place in range(len(lines))])


def unmarked(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the `meta` of a node without the mark."""
    return {**meta, "custom": {key: value for key, value in meta.get("custom", {}).items() if key != _KEY}}


def _mark(graph: fx.Graph, before: set[fx.Node], name: str, count: int) -> None:
    """Mark the last node of `graph` as the result of an operation, whose nodes are those that were not there before."""
    result = next(iter(reversed(graph.nodes)))
    members = sorted(ancestors([result], stop=before.__contains__))
    members = [node for node in members if node not in before]
    places = {node: place for place, node in enumerate(members)}
    for node in members:
        for read in node.all_input_nodes:
            places.setdefault(read, -1 - sum(place < 0 for place in places.values()))
    if members and min(places.values()) == -count:
        lines = [_as_data(_line(node), places) for node in members]
        result.meta["custom"] = {**(result.meta.get("custom") or {}), _KEY: {"name": name, "lines": lines}}


def _line(node: fx.Node) -> list[Any]:
    return [str(node.target), node.args, dict(node.kwargs)]


def _as_data(value: Any, places: dict[fx.Node, int]) -> Any:
    """Return the line of a node as data that a file can hold: numbers are the places of nodes."""
    if isinstance(value, fx.Node):
        return places[value]
    if isinstance(value, (list, tuple)):
        return [_as_data(item, places) for item in value]
    if isinstance(value, dict):
        return {key: _as_data(item, places) for key, item in value.items()}
    return _literal(value)


def _literal(value: Any) -> str:
    return "device" if isinstance(value, torch.device) else repr(value)


def _agree(data: Any, value: Any, nodes: dict[int, fx.Node]) -> bool:
    """Check whether `_as_data` would return `data` of a value, and note the nodes that it reads by their places."""
    if isinstance(data, int):
        return isinstance(value, fx.Node) and nodes.setdefault(data, value) is value
    if isinstance(data, dict):
        same = isinstance(value, dict) and data.keys() == value.keys()
        return same and all(_agree(data[key], value[key], nodes) for key in data)
    if isinstance(data, Sequence) and not isinstance(data, str):
        same = isinstance(value, (list, tuple)) and len(data) == len(value)
        return same and all(_agree(*pair, nodes) for pair in zip(data, value, strict=True))
    return not isinstance(value, (fx.Node, list, tuple, dict)) and data == _literal(value)
