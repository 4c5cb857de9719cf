"""Capture a model by `torch.export`, with every dimension dynamic that can be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..graph.turns import tracing
from .refusal import refusal


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    batch_only: Collection[str] = (),
) -> fx.GraphModule:
    """Export `model` on these inputs.

    Args:
        model, args, kwargs: the call.
        dynamic_shapes: as for `capture`.
        batch_only: names of arguments of which `"auto"` makes the batch alone dynamic.
    """
    if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
        return _export_as(model, args, kwargs, dynamic_shapes)

    def dynamic(leaf: Any, others: Any = Dim.AUTO) -> list[Any] | None:
        return [Dim.AUTO, *[others] * (leaf.dim() - 1)][: leaf.dim()] if isinstance(leaf, Tensor) else None

    def shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        dimensions: dict[str, Any] = pytree.tree_map(dynamic, dict(bound.arguments))
        fixed = {name: dynamic(bound.arguments[name], Dim.STATIC) for name in batch_only if name in bound.arguments}
        return dimensions | fixed

    # Show a batch of one twice if the model takes that, because torch.export specializes a size of one without a word.
    doubled = double_batch_of_one((args, kwargs))
    if doubled is not None:
        twice_args, twice_kwargs = doubled
        try:
            return _export_as(model, twice_args, twice_kwargs, shapes(twice_args, twice_kwargs))
        except CaptureError:
            pass
    return _export_as(model, args, kwargs, shapes(args, kwargs))


@tracing()
def _export_as(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> fx.GraphModule:
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise refusal(model, error, "torch.export") from error
    return program.module()


def double_batch_of_one(inputs: Any) -> Any:
    """Return a tree of inputs with its batch of one shown twice; None if the batch is of another size or missing."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return None
    twice = lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf  # noqa: E731
    return pytree.tree_map(twice, inputs)


def take_guards(gm: fx.GraphModule) -> Callable[..., object]:
    """Remove the guards of `gm` on its inputs; return them as a function of the inputs that raises AssertionError."""
    # torch.export puts its guards into a module of this name, and has no other way to ask whether a graph holds.
    calls = [node for node in gm.graph.find_nodes(op="call_module") if node.target == "_guards_fn"]
    if not calls:
        return lambda *inputs: None
    guards = gm.get_submodule("_guards_fn")
    for node in calls:
        gm.graph.erase_node(node)
    gm.delete_submodule("_guards_fn")
    gm.recompile()
    return guards
