"""Dynamo's graphs: the one home of what the backend has to know of `torch._dynamo`.

Dynamo captures in pieces, in a dialect of its own, and takes parameters as inputs. Here its graphs become ones that
the passes know, and go back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture.tracing import fake_like
from ..graph.subgraph import segment
from ..graph.tensors import register_tensor

Compiled = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, list[Any]], Compiled]


def compiler(name: str | Compiler) -> Compiler:
    """The backend of that name, or the one that is given."""
    # What torch.compile itself looks names up with; no public function returns a backend.
    return torch._dynamo.lookup_backend(name) if isinstance(name, str) else name


# From Dynamo's dialect and back.


def to_aten(gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> fx.GraphModule:
    """A graph as the passes know it: of aten operators, reading parameters as attributes.

    Args:
        gm: Dynamo's; it is not changed.
        inputs: Dynamo's example inputs. Those that are parameters are the model's own.
        names: the qualified names of the model's tensors by id; a parameter that has none gets one of its own.

    Returns:
        A graph of the same inputs. Those that are parameters are not read: attributes stand for them.
    """
    # The stand-ins of Dynamo's inputs: with the symbols of dynamic shapes, which its example inputs do not have.
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    with fake_mode(values), fx.traceback.preserve_node_meta():
        aten = make_fx(fx.Interpreter(_without_transforms(gm)).run, pre_dispatch=True)(*values)
    gm = fx.GraphModule(aten, aten.graph)
    for i, (node, tensor) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if isinstance(tensor, nn.Parameter) or id(tensor) in names:
            read_as_attribute(gm, node, names.get(id(tensor), f"input_{i}"), tensor)
    return gm


def _without_transforms(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` in which transforms of `torch.func` (vmap) are calls of modules of aten operators.

    Before autograd, as `to_aten` traces, the tensors inside a transform would be taken for constants.
    """
    whole = fx.GraphModule(gm, gm.graph)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    region: list[fx.Node] = []
    depth = 0
    for node in gm.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if not depth and not region:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        region.append(node)
        if not depth:
            traced, inputs, outputs = segment(region)
            values = (read.meta["example_value"] for read in inputs)
            whole.add_submodule(f"transform_{len(copies)}", make_fx(fx.GraphModule(gm, traced))(*values))
            call = graph.call_module(f"transform_{len(copies)}", tuple(copies[read] for read in inputs))
            copies |= {one: graph.call_function(operator.getitem, (call, i)) for i, one in enumerate(outputs)}
            region = []
    whole.graph = graph
    return whole


def fake_mode(values: Sequence[Any]) -> AbstractContextManager[Any]:
    """The mode that the stand-ins among `values` belong to."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def read_as_attribute(gm: fx.GraphModule, node: fx.Node, name: str, tensor: Tensor) -> None:
    """Let `gm` read `tensor` under a qualified name instead of the input `node`, which stays."""
    register_tensor(gm, name, tensor)
    with gm.graph.inserting_after(node):
        attribute = gm.graph.get_attr(name)
    attribute.meta = {"val": node.meta["val"]}
    node.replace_all_uses_with(attribute)


def to_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Undo `to_aten`, in place: let inputs stand for all tensors that `gm` reads as attributes.

    Args:
        gm: what `to_aten` returned, rewritten.
        inputs: as for `to_aten`.

    Returns:
        The tensors for which `gm` has got further inputs, and stand-ins for them, in their order: adapters that Dynamo
        does not know of, and constants. (An inner backend would take what is left as an attribute for a parameter.)
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    stand_in = next(value for node in placeholders if isinstance(value := node.meta["val"], FakeTensor))
    by_tensor = {id(tensor): node for tensor, node in zip(inputs, placeholders, strict=True)}
    further: list[Tensor] = []
    stand_ins: list[Tensor] = []
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = _attribute(gm, str(node.target))
        if not isinstance(tensor, Tensor):  # the body of a higher-order operator, or a flag
            continue
        if id(tensor) not in by_tensor:
            with gm.graph.inserting_before(placeholders[-1].next):
                placeholders.append(gm.graph.placeholder(f"further_{len(further)}"))
            by_tensor[id(tensor)] = placeholders[-1]
            further.append(tensor)
            stand_ins.append(fake_like(tensor, stand_in).requires_grad_(tensor.requires_grad))
            placeholders[-1].meta["val"] = stand_ins[-1]
        node.replace_all_uses_with(by_tensor[id(tensor)])
        gm.graph.erase_node(node)
    gm.recompile()
    return further, stand_ins


def _attribute(gm: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(gm.get_submodule(path), leaf)


def set_flag(gm: fx.GraphModule, node: fx.Node, value: bool) -> None:
    """Put the constant in the place of `node`, and take that out."""
    for user in list(node.users):
        user.args = fx.node.map_aggregate(user.args, lambda a: value if a is node else a)
        user.kwargs = fx.node.map_aggregate(user.kwargs, lambda a: value if a is node else a)
    gm.graph.erase_node(node)
