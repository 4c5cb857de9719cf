"""Turn Dynamo's graphs into graphs that the passes know, and back.

Dynamo captures a model in pieces, in a dialect of its own, and passes parameters as inputs. The passes take graphs of
aten operators that read parameters as attributes. `to_aten` makes the one of the other, `to_inputs` goes back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture.autograd_functions import Kept, keeping_functions
from ..capture.function_tracing.trace import fake_like
from ..compat.torch import FakeTensor
from ..graph.subgraph import segment
from ..graph.tensors import attribute_of, register_tensor

Compiled = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, list[Any]], Compiled]


def to_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Return Dynamo's graph as the passes know it: of aten operators, with parameters read as attributes.

    Args:
        gm: Dynamo's graph; it is not changed.
        inputs: Dynamo's example inputs. The parameters among them are the model's own.

    Returns:
        A graph of the same inputs. It does not read those that are parameters, but attributes in their place.
    """
    # These stand-ins have the symbols of dynamic shapes, which Dynamo's example inputs do not have.
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, fx.traceback.preserve_node_meta(), keeping_functions() as kept:
        aten = make_fx(_Interpreter(_without_transforms(gm), kept).run, pre_dispatch=True)(*values)
        kept.put_calls(aten)
    gm = fx.GraphModule(aten, aten.graph)
    for i, (node, tensor) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if isinstance(tensor, nn.Parameter):
            register_tensor(gm, name := f"input_{i}", tensor)
            with gm.graph.inserting_after(node):
                attribute = gm.graph.get_attr(name)
            attribute.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(attribute)
    return gm


class _Interpreter(fx.Interpreter):
    """Runs a graph to trace it, and keeps each autograd function in it, which Dynamo captured with its backward."""

    def __init__(self, gm: fx.GraphModule, kept: Kept) -> None:
        super().__init__(gm)
        self.kept = kept

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        from ..compat.dynamo import autograd_function_apply

        if target is autograd_function_apply:
            return self.kept.record(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _without_transforms(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which transforms of `torch.func` (vmap) are calls of modules of aten operators.

    `to_aten` traces before autograd, where the tensors inside a transform would be taken for constants.
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
            copies |= {output: graph.call_function(operator.getitem, (call, i)) for i, output in enumerate(outputs)}
            region = []
    whole.graph = graph
    return whole


def to_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Undo `to_aten`, in place: let `gm` read inputs in place of all its attributes.

    An inner backend would take a tensor that is left as an attribute for a parameter.

    Args:
        gm: the graph that `to_aten` returned, rewritten.
        inputs: as for `to_aten`.

    Returns:
        The tensors for which `gm` has got inputs after those that it had, and stand-ins for them, in the same order.
        They are adapters, which Dynamo does not know of, and constants.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    stand_in = next(value for node in placeholders if isinstance(value := node.meta["val"], FakeTensor))
    by_tensor = {id(tensor): node for tensor, node in zip(inputs, placeholders, strict=True)}
    added: list[Tensor] = []
    stand_ins: list[Tensor] = []
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = attribute_of(gm, str(node.target))
        if not isinstance(tensor, Tensor):  # the body of a higher-order operator, or a flag
            continue
        if id(tensor) not in by_tensor:
            with gm.graph.inserting_before(placeholders[-1].next):
                placeholders.append(gm.graph.placeholder(f"added_{len(added)}"))
            by_tensor[id(tensor)] = placeholders[-1]
            added.append(tensor)
            stand_ins.append(fake_like(tensor, stand_in).requires_grad_(tensor.requires_grad))
            placeholders[-1].meta["val"] = stand_ins[-1]
        node.replace_all_uses_with(by_tensor[id(tensor)])
        gm.graph.erase_node(node)
    gm.recompile()
    return added, stand_ins
