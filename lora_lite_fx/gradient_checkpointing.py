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
        for index, members in enumerate(list(_segments(self, outer))):
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
    if not any(True for _ in _segments(gm, gm.graph)):
        raise CaptureError(
            "checkpoint_layers: the model has no layers to checkpoint. A layer is an element of a ModuleList or"
            " Sequential, with a number in its qualified name as model.layers.0; and a layer that changes tensors in"
            " place is not checkpointed. The way out: checkpoint_layers=False."
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


def _segments(gm: fx.GraphModule, graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each layer, in graph order, in pieces that can be run as one.

    A piece ends where a node outside the layer reads from it, so that what a piece reads comes before all of it.
    """
    outside = _overwriting(gm, graph)
    current: str | None = None
    members: dict[fx.Node, None] = {}
    for node in graph.nodes:
        layer = None if node in outside else _layer_of(node)
        if members and layer != current and (layer or any(read in members for read in node.all_input_nodes)):
            yield list(members)
            members = {}
        if layer:
            current = layer
            members[node] = None


def _layer_of(node: fx.Node) -> str | None:
    """The layer that `node` computes a part of, with the number of the layer's call; None outside of layers."""
    if not node.op.startswith("call_"):
        return None
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if found := _LAYER.match(path):
            return f"{found[0]}@{key.partition('@')[2]}"
    return None


def _overwriting(gm: fx.GraphModule, graph: fx.Graph) -> set[fx.Node]:
    """The nodes that write in place, and those that read what is overwritten after them: not to be run again."""
    tensors: dict[fx.Node, set[Any]] = {}
    readers: dict[Any, list[fx.Node]] = {}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tensors[node] = {node.target if node.op == "get_attr" else node}
        for read in node.all_input_nodes:
            for tensor in tensors[read]:
                readers.setdefault(tensor, []).append(node)
            if _may_return_a_view(node):
                tensors[node] |= tensors[read]
        for written in _written(gm, node):
            for tensor in tensors[written]:
                found.update(readers[tensor])
    return found


def _may_return_a_view(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The operands that `node` changes. Where no schema says it, as in symbolic traces, names and flags do."""
    if isinstance(node.target, torch._ops.OpOverload):
        return written_operands(node)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        writes = getattr(module, "inplace", False) or getattr(module, "track_running_stats", False)
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
