"""A graph as a function that others can trace without losing the records on its nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx import traceback

from ..compat.torch import codegen_of
from ..errors import AdapterError
from .copies import copy_graph
from .subgraph import copy_of


def traceable_forward(gm: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """Return `graph` as a function of a module with the tensors of `gm`, and of its inputs.

    In a symbolic trace of `torch.fx` the function copies the nodes into the graph that is made. Other tracers run the
    operations, and what they record gets the records of the nodes as `meta["custom"]`.
    """
    annotated, copied = _annotated_forward(gm, graph), _copied_forward(gm, graph)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        # A module may call the graph on constants while it is traced.
        values: list[Any] = []
        fx.node.map_aggregate((args, kwargs), values.append)
        is_symbolic = any(isinstance(value, fx.Proxy) for value in values)
        return (copied if is_symbolic else annotated)(self, *args, **kwargs)

    return forward


def _annotated_forward(gm: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    copied = copy_graph(graph)
    for node in copied.nodes:
        if node.op == "call_function" and (custom := node.meta.get("custom")):
            node.target = _annotated(node.target, custom)
    return type(fx.GraphModule(gm, copied)).forward


def _annotated(target: Any, custom: dict[str, Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with traceback.annotate(custom):
            if torch.compiler.is_dynamo_compiling():
                return target(*args, **kwargs)
            with traceback.preserve_node_meta():
                return target(*args, **kwargs)

    return call


def _copied_forward(gm: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """Return a function with the signature of `graph` that copies its nodes into the graph of its arguments."""
    inputs = graph.find_nodes(op="placeholder")
    flattening = copy_of((), inputs, tuple(inputs))
    codegen: Any = copy.copy(codegen_of(graph))
    if hasattr(codegen, "pytree_info"):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
    flattening.set_codegen(codegen)
    flatten = type(fx.GraphModule(gm, flattening)).forward

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        values = flatten(self, *args, **kwargs)
        return graph.process_outputs(_copied_into_trace(self, graph, dict(zip(inputs, values, strict=True))))

    return forward


def _copied_into_trace(gm: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of `graph` into the graph that is traced; return what its output returns, with proxies.

    Args:
        gm: the module of the graph, in the module that is traced.
        graph: the graph.
        values: the values of its inputs, at least one of which is a proxy.
    """
    tracer = next(value for value in values.values() if isinstance(value, fx.Proxy)).tracer
    try:
        path = tracer.path_of_module(gm)  # type: ignore[attr-defined]
    except (NameError, AttributeError) as error:
        raise AdapterError(
            "A graph can be traced by torch.fx if it is the module that is traced, or a submodule of that; this one is"
            " neither. The way out: symbolic_trace(gm), or a module that has gm as an attribute."
        ) from error
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = tracer.create_arg(values[node])
            if isinstance(copies[node], fx.Node):
                copies[node].meta = {**node.meta, **copies[node].meta}
        elif node.op != "output":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            target = node.target
            if path and node.op in ("get_attr", "call_module"):
                target = f"{path}.{target}"
            copies[node] = tracer.create_node(node.op, target, args, kwargs, node.name, node.type)
            copies[node].meta = copy.copy(node.meta)

    def value_of(node: fx.Node) -> Any:
        copied = copies[node]
        return tracer.proxy(copied) if isinstance(copied, fx.Node) else copied

    return fx.node.map_arg(graph.output_node().args[0], value_of)
