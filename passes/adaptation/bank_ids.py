"""The input of a graph with a bank that has the slot of each row of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ...adapters.bank import IDS
from ...capture.graph_calls import add_input, drop_input
from ...compat.torch import disable_current_modes
from ...errors import ConfigError
from ...graph.insertion import insertions
from ...graph.parameter_work import first_input
from ...sites.batch.batch_dimension import batch_sizes


def ids_input(graph: fx.Graph) -> fx.Node:
    """Return the input of a graph for the ids of its banks, `adapter_ids (batch,)`; make it if there is none.

    Raises:
        ConfigError: the model has an input of that name.
        AdapterError: the rows of the batch cannot be told.
    """
    present = find_ids(graph)
    if present is not None:
        # To look through all records takes long, and each site asks.
        if not present.meta.get(IDS) and not any(insertion.fields.get("slots") for insertion in insertions(graph)):
            raise ConfigError(f"The model has an input {IDS!r}, and a bank needs that name for its own.")
        return present
    beside = next(
        value for node in graph.find_nodes(op="placeholder") if isinstance(value := node.meta.get("val"), Tensor)
    )
    size = next(iter(batch_sizes(graph).values()))
    with disable_current_modes():  # as that of fake tensors of a caller, with which those of the graph do not mix
        ids = beside.new_empty((size,), dtype=torch.int64)
    node = add_input(graph, IDS, ids)
    node.meta[IDS] = True  # for the sites before the first of which a record says that it is of a bank
    return node


def read_ids(gm: fx.GraphModule, ids: Tensor) -> None:
    """Let the graph of `gm` read the ids of its banks as a buffer, and not from the input, which stays.

    So what depends on parameters and ids alone is parameter work.
    """
    graph, node = gm.graph, find_ids(gm.graph)
    assert node is not None
    gm.register_buffer(IDS, ids, persistent=False)
    with graph.inserting_before(first_input(graph)):
        read = graph.get_attr(IDS)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)


def find_ids(graph: fx.Graph) -> fx.Node | None:
    """Return the input that is called as that of the ids."""
    return next((node for node in graph.find_nodes(op="placeholder") if node.target == IDS), None)


def drop_ids(graph: fx.Graph) -> None:
    """Take the input for the ids out of a graph without banks."""
    node = find_ids(graph)
    if node is not None and not node.users and node.meta.get(IDS):
        drop_input(graph, node)
