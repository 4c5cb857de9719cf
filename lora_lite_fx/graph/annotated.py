"""A graph as a function that torch.export can trace without losing the records on its nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx import traceback

from .copies import copy_graph


def annotated_forward(gm: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """Return `graph` as a function of a module with the tensors of `gm`, and of its inputs.

    What is traced when the function runs gets the records of the nodes that run, as `meta["custom"]`.
    """
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
