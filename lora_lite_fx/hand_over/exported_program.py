"""`export`: an adapted model as an exported program of plain tensors, which loads where torch alone is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..capture.forward_signature import signature_of
from ..errors import ConfigError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.tensors import outside_inference_mode
from ..passes import DropMetadataAsserts
from .bake import bake as baked_graph
from .served_graph import ServedGraph, Tensors, graph_to_serve


@outside_inference_mode()
def export(
    model: nn.Module,
    inputs: Tensors | tuple[Tensor, ...] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    cache: bool = False,
    bake: bool = False,
) -> ExportedProgram:
    """Return a model as an exported program with plain tensors in and out.

    `torch.export.save` writes it to a file that loads and runs where torch alone is installed:
    `torch.export.load("m.pt2").module()(**inputs)`. Batch and length stay open. Its tensors have the names of
    `adapter_state_dict`, so that `inspect`, `merge` and `load` take it.

    Args:
        model: a result of `rewrite`, `load`, `adapt` or `merge`. Only the adapters that act are exported.
        inputs: arguments of a call, tensors: a tuple in the order of `forward`, or a dict by name. None for those that
            the graph was captured with but labels.
        outputs: names of fields of the model's output. One gives the tensor itself, several a tuple; None for all
            tensors of the output.
        cache: export a step of a causal language model, see `step_with_cache`.
        bake: make constants of what depends on parameters alone, see `bake`.

    Raises:
        AdapterError: `model` is no such result.
        CallError, ConfigError: the inputs or outputs are not those of the model.
        CaptureError: the call of an adapted model cannot be captured.
    """
    return exported(served(model, inputs, outputs, cache, bake, "export"))


def served(
    model: nn.Module,
    inputs: Tensors | tuple[Tensor, ...] | None,
    outputs: str | Sequence[str] | None,
    cache: bool,
    bake: bool,
    function: str,
    scaled: Mapping[str, Tensor] | None = None,
) -> ServedGraph:
    """Return the graph of plain tensors that `export` exports.

    Args:
        model, inputs, outputs, cache, bake: as of `export`.
        function: what it is for, for messages.
        scaled: adapters whose coefficients are buffers of the graph, as of `ServedGraph.of`.
    """
    gm, inputs, outputs = graph_of_call(model, inputs, outputs, cache)
    if bake:
        gm = graph_to_serve(baked_graph(gm))
    return ServedGraph.of(gm, inputs, outputs, function, scaled)


def graph_of_call(
    model: nn.Module,
    inputs: Tensors | tuple[Tensor, ...] | None,
    outputs: str | Sequence[str] | None,
    cache: bool,
) -> tuple[AdaptedGraphModule, Tensors | None, str | Sequence[str] | None]:
    """Return the graph of a call or of a step with a cache, and the inputs and outputs to take of it, as `export`."""
    if isinstance(inputs, tuple) and isinstance(model, nn.Module):
        inputs = _named(model, inputs)
    if not cache:
        return graph_to_serve(model, inputs), inputs, outputs
    from .step_with_cache import step_with_cache

    return *step_with_cache(model, inputs, outputs), None  # it returns these outputs, and the cache


def _named(model: nn.Module, inputs: tuple[Any, ...]) -> Tensors:
    """Return positional inputs by the names of the arguments of `forward`."""
    try:
        return signature_of(model).bind(*inputs).arguments
    except TypeError as error:
        raise ConfigError(f"inputs does not fit {type(model).__name__}.forward: {error}.") from error


def exported(graph: ServedGraph, largest: tuple[int, int] | None = None) -> ExportedProgram:
    """Export a graph of plain tensors, with each size open that the graph leaves open.

    Args:
        graph: the graph.
        largest: bounds of the first size of each input and of its other sizes, where the example is not larger; None
            for no bounds.
    """

    captured = {str(node.target): node.meta.get("val") for node in graph.gm.graph.find_nodes(op="placeholder")}

    def size(name: str, dim: int, example: int) -> Any:
        value = captured[name]
        if isinstance(value, Tensor) and dim < value.dim() and isinstance(value.shape[dim], int):
            return Dim.STATIC
        return Dim.AUTO if largest is None else Dim.AUTO(max=max(largest[dim > 0], example))

    sizes = {
        name: {dim: size(name, dim, example) for dim, example in enumerate(tensor.shape)}
        for name, tensor in graph.inputs.items()
    }
    with torch.no_grad():
        program = torch.export.export(graph.gm, (), graph.inputs, dynamic_shapes=sizes, strict=False)
    DropMetadataAsserts().run(program.graph_module)  # at one token they take 5 to 10 percent of the time
    program.graph_module.recompile()
    return program
