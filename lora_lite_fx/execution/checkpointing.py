"""Gradient checkpointing: layers keep only their inputs for the backward pass, and run again in it.

The graph itself stays flat, so that passes, `remove`, `merge` and `inspect` do not see checkpointing: it is a property
of the program that runs. A layer, as in the field `layers` of a config, is all modules with the same qualified name up
to the first number in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CaptureError
from ..graph.direct_calls import OpOverload
from ..graph.layers import layer_of
from ..graph.subgraph import forward_of, replace_by_call, segment
from ..graph.writes import may_return_a_view, written


def cut_layers(gm: fx.GraphModule, outer: fx.Graph, name: str) -> dict[str, Callable[..., Any]]:
    """Replace each layer of `outer` by one call of a method of `gm`.

    Args:
        gm: the module that has the tensors.
        outer: the graph, changed in place.
        name: the beginning of the names of the methods.

    Returns:
        The methods by name. They compute the layers, random numbers and gradients included. They run under
        `torch.utils.checkpoint` while `gm` trains with gradients on, and without it otherwise.
    """
    methods = {}
    for index, members in enumerate(_segments(gm, outer)):
        method = f"{name}_{index}"
        methods[method] = _under_checkpoint(forward_of(gm, _cut_out(outer, members, method)))
    return methods


def require_layers(gm: fx.GraphModule) -> None:
    """Raise `CaptureError` if the graph has no layers to checkpoint."""
    if not _segments(gm, gm.graph):
        raise CaptureError(
            "checkpoint_layers: the model has no layers to checkpoint. A layer is an element of a ModuleList or"
            " Sequential, with a number in its qualified name as in model.layers.0."
            " The way out: checkpoint_layers=False."
        )


def _segments(gm: fx.GraphModule, graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of each layer, in graph order, in pieces that can run as one, and run again."""
    overwritten = _overwritten(gm, graph)
    outside: set[fx.Node] = set()
    while True:
        pieces = list(_pieces(graph, outside))
        piece_of: dict[fx.Node | None, int] = {node: index for index, piece in enumerate(pieces) for node in piece}
        # A piece may overwrite what it made itself; to be run again, it must not read what is overwritten elsewhere.
        torn: set[fx.Node] = set()
        for made_by, readers in overwritten:
            places = {piece_of.get(reader) for reader in readers}
            if places not in ({None}, {piece_of.get(made_by)}):
                torn.update(readers)
        if not torn:
            return pieces
        outside |= torn


def _pieces(graph: fx.Graph, outside: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield the nodes of each layer but those in `outside`, cut at nodes outside the layer that must not run before it.

    So a piece can run at the place of its last node. The nodes of others that stand between its nodes run before it.
    """
    current: str | None = None
    piece: dict[fx.Node, None] = {}
    for node in graph.nodes:
        layer = None if node in outside else layer_of(node)
        waits = layer or _is_impure(node) or any(read in piece for read in node.all_input_nodes)
        if piece and layer != current and waits:
            yield list(piece)
            piece = {}
        if layer:
            current = layer
            piece[node] = None
    if piece:
        yield list(piece)


def _is_impure(node: fx.Node) -> bool:
    """Check whether `node` draws random numbers or writes in place, so that its turn matters; if unknown, it may."""
    if isinstance(node.target, OpOverload):
        return node.is_impure()
    return node.op.startswith("call_") and getattr(node.target, "__module__", "") != operator.mul.__module__


def _overwritten(gm: fx.GraphModule, graph: fx.Graph) -> list[tuple[fx.Node | None, list[fx.Node]]]:
    """Return the node that makes each tensor that is written in place, and those that read it up to the last write."""
    made_by: dict[Any, fx.Node] = {}
    seen_by: dict[fx.Node, set[Any]] = {}  # the tensors that a node's value may share memory with
    readers: dict[Any, list[fx.Node]] = {}
    overwritten: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        own = node.target if node.op == "get_attr" else node
        made_by.setdefault(own, node)
        seen_by[node] = {own}
        for read in node.all_input_nodes:
            for tensor in seen_by[read]:
                readers.setdefault(tensor, []).append(node)
            if may_return_a_view(node):
                seen_by[node] |= seen_by[read]
        for operand in written(gm, node):
            overwritten |= {tensor: list(readers[tensor]) for tensor in seen_by[operand]}
        if node.op == "call_module" and getattr(gm.get_submodule(str(node.target)), "track_running_stats", False):
            overwritten.setdefault(node.target, []).append(node)  # the module's own statistics, which no node makes
    return [(made_by.get(tensor), reading) for tensor, reading in overwritten.items()]


def _cut_out(outer: fx.Graph, members: list[fx.Node], name: str) -> fx.Graph:
    """Replace `members` of `outer` by one call of the module's method `name`; return the graph of that method."""
    graph, inputs, results = segment(members)
    replace_by_call(outer, name, inputs, members, results)
    return graph


def _under_checkpoint(segment: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, *inputs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(segment, self, *inputs, use_reentrant=False)
        return segment(self, *inputs)

    return run
