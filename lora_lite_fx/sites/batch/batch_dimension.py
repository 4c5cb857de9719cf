"""Find the rows of the batch in a value of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import AdapterError
from ...graph.queries import line_of
from .follow_rows import ROWS_LOST, RowFlow
from .operator_rules import Lost, Rows


def batch_sizes(graph: fx.Graph) -> dict[str, torch.SymInt]:
    """Return the size of the batch: the first dimension of the inputs, as it is written in shapes.

    Inputs that meet by broadcasting alone, such as a mask, may have it under another symbol.

    Raises:
        AdapterError: it is not known, because the graph has no shapes; or it is a number, so that another dimension of
            that size could not be told from it; or inputs have different numbers of rows.
    """
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    shapes = [value.shape for value in values if isinstance(value, Tensor) and value.dim()]
    shapes = [shape for shape in shapes if len(shape) > 1] or shapes  # without vectors of positions
    others: set[str] = {str(size) for shape in shapes for size in shape[1:]}
    sizes: dict[str, Any] = {str(shape[0]): shape[0] for shape in shapes if str(shape[0]) not in others}
    symbols = {name: size for name, size in sizes.items() if isinstance(size, torch.SymInt)}
    if symbols and len({optimization_hint(size, None) for size in symbols.values()}) == 1:
        return symbols
    what = "it has no shapes"
    if symbols:
        what = f"its inputs have different numbers of rows ({', '.join(symbols)})"
    elif shapes:
        what = "the batch is fixed in it"
    raise AdapterError(
        f"The rows of the batch cannot be told in this graph, because {what}. The way out: capture with example_inputs"
        " of two rows or more, and a batch of any size (dynamic_shapes='auto')."
    )


def follow_rows(graph: fx.Graph) -> RowFlow:
    """Return where the rows of the batch are in the values of a graph.

    Raises:
        AdapterError: as `batch_sizes`.
    """
    return RowFlow(graph, batch_sizes(graph))


def inputs_with_rows(graph: fx.Graph) -> tuple[int, ...]:
    """Return the indices of the inputs whose first dimension is the batch.

    Raises:
        AdapterError: as `batch_sizes`.
    """
    sizes = batch_sizes(graph)
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    return tuple(
        index
        for index, value in enumerate(values)
        if isinstance(value, Tensor) and value.dim() > 1 and str(value.shape[0]) in sizes
    )


def batch_dim(flow: RowFlow, node: fx.Node, site: str) -> int:
    """Return the dimension of a value that counts the rows of the batch, in the order of the inputs.

    Args:
        flow: follows the rows through the graph, see `follow_rows`.
        node: the value, an output of a site.
        site: the name of the site, for messages.

    Raises:
        AdapterError: the graph does not prove which row is which there.
    """
    state, why = flow.at(node), _why_unknown(flow, node)
    if not why and isinstance(state, Rows):
        if not (other := flow.others_asked(state)):
            return state.dim
        why = (
            f"its rows are those of {state.source}, which nothing shows to be those of {other}, as at other sites; one"
            " torch.export.Dim for both in dynamic_shapes would show it"
        )
    value = node.meta.get("val")
    shape = f", whose output is ({', '.join(map(str, value.shape))})" if isinstance(value, Tensor) else ""
    raise AdapterError(
        f"The rows of the batch cannot be told at {site!r}{shape}: {why}. The way out: one coefficient or adapter for"
        " all rows, or leave the site out by exclude_names."
    )


def note_lost_rows(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Note on values that other graphs take as inputs if it is not proven there which row is which.

    Args:
        graph: computes the values.
        nodes: the values, in whose `meta` it is noted.
    """
    try:
        flow = follow_rows(graph)
    except AdapterError as error:
        reasons = {node: str(error) for node in nodes}
    else:
        reasons = {node: _why_unknown(flow, node) for node in nodes if flow.at(node) is not None}
    for node, why in reasons.items():
        if why:
            node.meta[ROWS_LOST] = f"an earlier stage, where {why}"


def _why_unknown(flow: RowFlow, node: fx.Node) -> str:
    """Return why no dimension of a value is known to count the rows alone, in order; empty if one is."""
    state = flow.at(node)
    if isinstance(state, Lost):
        one = f"{state.why} makes one value of all rows"
        return one if state.is_one else f"nothing proves which row is which after {state.why}"
    if not isinstance(state, Rows):
        return "what it computes does not depend on them"
    if state.order is not None:
        return f"they are in the order of {state.order.name}{line_of(state.order)}"
    return "" if flow.is_whole(node, state) else "they are joined with other dimensions"
