"""Find the rows of the batch in a value of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..errors import AdapterError


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


def batch_dim(node: fx.Node, site: str) -> int:
    """Return the dimension of a value that counts the rows of the batch.

    Args:
        node: the value, an output of a site.
        site: the name of the site, for messages.

    Raises:
        AdapterError: as `batch_sizes`; or not one dimension has that size: the rows are joined with other dimensions,
            or are not those of the batch.
    """
    sizes = batch_sizes(node.graph)
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, Tensor) else ()
    found = [dim for dim, own in enumerate(shape) if str(own) in sizes]
    if len(found) == 1:
        return found[0]
    raise AdapterError(
        f"The rows of the batch cannot be told at {site!r}, whose output is ({', '.join(map(str, shape))}) where the"
        f" batch is {' or '.join(sizes)}: they are joined with other dimensions, or are not those of the batch. The way"
        " out: one coefficient or adapter for all rows, or leave the site out by exclude_names."
    )
