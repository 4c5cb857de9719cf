"""Gradient checkpointing: a graph whose layers keep only their inputs for the backward pass and are run again in it.

The graph stays flat, so that passes, `remove`, `merge` and `inspect` see nothing of it: checkpointing is a property
of how the graph is executed. A layer is what the field `layers` of a config counts: the modules up to the first
number in their qualified name.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils.checkpoint import checkpoint

from .capture import keep_aliases, written_operands
from .errors import CaptureError

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


class CheckpointedGraphModule(fx.GraphModule):
    """A graph module that runs its layers under `torch.utils.checkpoint` while it trains with gradients on.

    It computes what the plain module over the same graph does, random numbers and gradients included, and runs
    plainly in evaluation mode and without gradients. Every recompile cuts the graph anew, so that passes can change it.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        # The class is this module's alone. Its methods are the layers; the outer graph calls them as if modules.
        cls: Any = type(self)
        outer = copy.deepcopy(self.graph)
        for index, members in enumerate(_segments(self, outer)):
            name = f"_checkpointed_{index}"
            segment = _cut_out(outer, members, name)
            setattr(cls, name, _under_checkpoint(_forward_of(self, segment)))
        cls.forward = _forward_of(self, outer)
        return code


def checkpointed(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same tensors, with its layers checkpointed.

    Args:
        gm: what `rewrite` or `load` returned. It is not changed; the result has its parameters, not copies of them,
            so that an optimizer of the one serves the other.

    Raises:
        CaptureError: the graph has no layers.
    """
    if isinstance(gm, CheckpointedGraphModule):
        return gm
    if not _segments(gm, gm.graph):
        raise CaptureError(
            "checkpoint_layers: the model has no layers to checkpoint. A layer is an element of a ModuleList or"
            " Sequential, with a number in its qualified name as in model.layers.0."
            " The way out: checkpoint_layers=False."
        )
    result = CheckpointedGraphModule(gm, gm.graph)
    keep_aliases(gm, result)
    return result.train(gm.training)


def checkpoints_layers(model: nn.Module | ExportedProgram) -> bool:
    """Whether `model` checkpoints its layers: a graph of `checkpointed`, or a Hugging Face model set to do so."""
    return isinstance(model, CheckpointedGraphModule) or (
        isinstance(model, nn.Module)
        and any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    )


# Cutting a graph into segments.


def _segments(gm: fx.GraphModule, graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each layer, in graph order, in pieces that can be run as one, and again."""
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
    """The nodes of each layer but those in `outside`, cut at nodes outside the layer that must not run before it.

    So a piece can run where its last node stands, with the other nodes that stand between its own before it.
    """
    current: str | None = None
    piece: dict[fx.Node, None] = {}
    for node in graph.nodes:
        layer = None if node in outside else _layer_of(node)
        waits = layer or _is_impure(node) or any(read in piece for read in node.all_input_nodes)
        if piece and layer != current and waits:
            yield list(piece)
            piece = {}
        if layer:
            current = layer
            piece[node] = None
    if piece:
        yield list(piece)


def _layer_of(node: fx.Node) -> str | None:
    """The layer that `node` computes a part of, with the number of the layer's call; None outside of layers."""
    if not node.op.startswith("call_"):
        return None
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if found := _LAYER.match(path):
            return f"{found[0]}@{key.partition('@')[2]}"
    return None


def _is_impure(node: fx.Node) -> bool:
    """Whether `node` draws random numbers or writes in place, so that its turn matters; it may, if nothing is known."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure()
    return node.op.startswith("call_") and getattr(node.target, "__module__", "") != operator.mul.__module__


def _overwritten(gm: fx.GraphModule, graph: fx.Graph) -> list[tuple[fx.Node | None, list[fx.Node]]]:
    """Each tensor that is written in place: the node that makes it, and those that read it up to the last write."""
    made_by: dict[Any, fx.Node] = {}
    seen_by: dict[fx.Node, set[Any]] = {}  # the tensors that a node's value may share memory with
    readers: dict[Any, list[fx.Node]] = {}
    found: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        own = node.target if node.op == "get_attr" else node
        made_by.setdefault(own, node)
        seen_by[node] = {own}
        for read in node.all_input_nodes:
            for tensor in seen_by[read]:
                readers.setdefault(tensor, []).append(node)
            if _may_return_a_view(node):
                seen_by[node] |= seen_by[read]
        for written in _written(gm, node):
            found |= {tensor: list(readers[tensor]) for tensor in seen_by[written]}
        if node.op == "call_module" and getattr(gm.get_submodule(str(node.target)), "track_running_stats", False):
            found.setdefault(node.target, []).append(node)  # the module's own statistics, which no node makes
    return [(made_by.get(tensor), reading) for tensor, reading in found.items()]


def _may_return_a_view(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The operands that `node` changes. Where no schema says it, as in symbolic traces, names and flags do."""
    if isinstance(node.target, torch._ops.OpOverload):
        return written_operands(node)
    if node.op == "call_module":
        writes = getattr(gm.get_submodule(str(node.target)), "inplace", False)
    else:
        name = str(getattr(node.target, "__name__", node.target))
        flags = (*node.args, node.kwargs.get("inplace"))
        writes = re.search(r"[^_]_$", name) or any(flag is True for flag in flags)
    return node.all_input_nodes[:1] if writes else []


def _cut_out(outer: fx.Graph, members: list[fx.Node], name: str) -> fx.Graph:
    """Replace `members` of `outer` by one call of the module's method `name`; returns the graph of that method."""
    own = set(members)
    inputs = list(dict.fromkeys(read for node in members for read in node.all_input_nodes if read not in own))
    results = [node for node in members if not own.issuperset(node.users)]
    segment = fx.Graph()
    copies = {node: segment.placeholder(node.name) for node in inputs}
    for node in members:
        copies[node] = segment.node_copy(node, copies.__getitem__)
    segment.output(tuple(copies[node] for node in results))
    with outer.inserting_after(members[-1]):
        call = outer.call_module(name, tuple(inputs))
    with outer.inserting_after(call):
        for index, node in reversed(list(enumerate(results))):
            result = outer.call_function(operator.getitem, (call, index))
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    for node in reversed(members):
        outer.erase_node(node)
    return segment


# Running it.


def _forward_of(gm: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """`graph` as a function of a module that has what `gm` has, and its inputs."""
    return type(fx.GraphModule(gm, graph)).forward


def _under_checkpoint(segment: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, *inputs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(segment, self, *inputs, use_reentrant=False)
        return segment(self, *inputs)

    return run
