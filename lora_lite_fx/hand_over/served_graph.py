"""The graph that a runtime is to run: plain tensors in and out, in evaluation, and nothing in it but what acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.bank import IDS
from ..capture.export import double_batch_of_one
from ..capture.inputs.example_inputs import example_inputs_of
from ..capture.omissions import size_in_example
from ..capture.origins.origin import is_hugging_face
from ..capture.origins.wrong_arguments import check_model
from ..capture.outputs import leaves_by_path
from ..capture.signature import CallSignature
from ..compat.torch import codegen_of, pytree
from ..errors import AdapterError, CallError, ConfigError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.choose_program import constant_switches
from ..execution.derive_program import optimized_graph
from ..execution.optimize import optimize
from ..execution.run_program import NUMBER, ProgramKey
from ..graph.copies import Draft
from ..graph.modes import parts_with_modes
from ..graph.tensors import keep_registration, register_tensor
from ..hugging_face.adapted_model import Adapted
from ..passes import LeaveOutDropout, Pipeline, input_name
from ..rewriting.capture import capture

Tensors = Mapping[str, Tensor]
"""The inputs of a call, by the names of the model's arguments."""

_OF_TRAINING = ("labels", "num_items_in_batch")
"""Arguments that nobody passes who serves a model."""


def graph_to_serve(model: object, inputs: Tensors | None = None) -> AdaptedGraphModule:
    """Return the graph of a model for a call with these inputs.

    Args:
        model: a result of `rewrite`, `load`, `adapt` or `merge`.
        inputs: those that an adapted or merged model is called with; None for what its config says.

    Raises:
        AdapterError: it is something else.
    """
    if isinstance(model, AdaptedGraphModule):
        return model
    if isinstance(model, fx.GraphModule):
        return as_graph(optimize(model))
    if isinstance(model, Adapted):
        return model.graph_of_call(inputs_to_serve(model.adapters_taken_off()) if inputs is None else dict(inputs))
    check_model(model)
    assert isinstance(model, nn.Module)
    if not isinstance(inputs, Mapping | None):
        raise inputs_by_name(inputs)
    return as_graph(capture(model, inputs_to_serve(model) if inputs is None else dict(inputs)))


def inputs_to_serve(model: nn.Module) -> dict[str, Any] | None:
    """Return inputs of an encoder with a decoder, with tokens of the decoder; None for what `capture` takes by default.

    By default it takes labels, of which the model makes these tokens. Nobody serves that.
    """
    config: Any = model.config if is_hugging_face(model) else None
    if config is None or not config.is_encoder_decoder:
        return None
    return example_inputs_of(model, ("labels",))


def as_graph(gm: fx.GraphModule) -> AdaptedGraphModule:
    """Return a graph of this library's as what it is."""
    assert isinstance(gm, AdaptedGraphModule)
    return gm


def evaluated_graph(
    gm: AdaptedGraphModule, function: str, left_out: tuple[str, ...] = (), scaled: Mapping[str, Tensor] | None = None
) -> fx.Graph:
    """Return a copy of the flat graph of `gm`: in evaluation, and with the switches of now.

    Args:
        gm: the graph module, which is not changed.
        function: what it is for, for messages.
        left_out: the arguments that a call leaves out, for which the copy has constants.
        scaled: the adapters whose coefficients are inputs of the copy, see `ScaleAdapters`. Others are constants.

    Raises:
        AdapterError: a coefficient of an adapter is not one number, or the parameters are DTensors.
    """
    assert gm.execution is not None
    if gm.execution.finish is not None:
        raise AdapterError(
            f"llfx.{function} does not take DTensors, which the parameters of this graph are. The way out: save the"
            " adapters, and load them onto the whole model."
        )
    acting, scales = constant_switches(gm, f"llfx.{function}")
    if scaled:
        numbers = dict(scales)
        names = [name for name in gm.derived.names if name in numbers or name in scaled]
        scales = tuple((name, NUMBER if name in scaled else numbers[name]) for name in names)
    mode = False if parts_with_modes(gm.flat_graph)[0] else None
    graph, _ = optimized_graph(gm, ProgramKey("exported", left_out, mode=mode, acting=acting, scales=scales))
    return graph


@dataclass(frozen=True)
class ServedGraph:
    """A graph of plain tensors.

    Args:
        gm: takes the inputs by name, and returns a tensor or a tuple of them.
        inputs: an example of them, in the order of the graph.
        outputs: the names of what it returns.
    """

    gm: fx.GraphModule
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    @classmethod
    def of(
        cls,
        gm: AdaptedGraphModule,
        inputs: Tensors | None,
        outputs: str | Sequence[str] | None,
        function: str,
        scaled: Mapping[str, Tensor] | None = None,
    ) -> ServedGraph:
        """Return the graph of the calls of `gm` with these inputs, over the same tensors.

        Args:
            gm: the graph module, which is not changed.
            inputs: an example; None for all that the graph takes but labels.
            outputs: the names of what is to be returned; None for all tensors.
            function: what it is for, for messages.
            scaled: by name of an adapter, a tensor `()` that becomes a buffer of the graph, called `input_name(name)`:
                the coefficient of the adapter.

        Raises:
            CallError: the graph does not take the inputs.
            ConfigError: it returns nothing of such a name.
        """
        assert gm.execution is not None
        if inputs is None:
            inputs = _example_of(gm)
        if not isinstance(inputs, Mapping) or not all(isinstance(value, Tensor) for value in inputs.values()):
            raise inputs_by_name(inputs, next(node.target for node in gm.flat_graph.find_nodes(op="placeholder")))
        inputs = _with_open_sizes(gm, inputs)
        signature, left_out = gm.execution.signature, tuple[str, ...]()
        if signature is not None:
            _, left_out = signature.bind((), {name: value for name, value in inputs.items() if name != IDS})
        draft = Draft(gm, evaluated_graph(gm, function, left_out, scaled))
        for name, value in (scaled or {}).items():
            _input_to_buffer(draft, input_name(name), value)
        Pipeline((LeaveOutDropout(),)).run(draft)
        results = _named_results(draft.graph, signature, left_out)
        names = _chosen(results, outputs)
        graph = draft.graph
        chosen = [results[name] for name in names]
        graph.output_node().args = (chosen[0] if len(chosen) == 1 else tuple(chosen),)
        graph.set_codegen(fx.graph.CodeGen())
        graph.eliminate_dead_code()
        ordered = {}
        for node in graph.find_nodes(op="placeholder"):
            name = str(node.target)
            if name in inputs:
                ordered[name] = inputs[name]
            elif node.users:
                raise CallError(f"{name} is missing in the inputs, which the graph takes beside {', '.join(inputs)}.")
            else:
                graph.erase_node(node)
        if unknown := [name for name in inputs if name not in ordered]:
            raise CallError(f"{unknown[0]} is not an input of the graph, which takes {', '.join(ordered)}.")
        plain = fx.GraphModule(draft, graph)  # with only the tensors that the graph reads
        keep_registration(gm, plain)
        return cls(plain.eval(), ordered, names)


def _input_to_buffer(gm: fx.GraphModule, name: str, value: Tensor) -> None:
    """Make an input of a graph a buffer of its module."""
    (node,) = [node for node in gm.graph.find_nodes(op="placeholder") if node.target == name]
    register_tensor(gm, name, value)
    with gm.graph.inserting_before(node):
        read = gm.graph.get_attr(name)
    read.meta = node.meta
    node.replace_all_uses_with(read)
    gm.graph.erase_node(node)


def _example_of(gm: AdaptedGraphModule) -> dict[str, Tensor]:
    """Return inputs with the sizes that the graph was captured with."""
    inputs: dict[str, Tensor] = {}
    for node in gm.flat_graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"inputs is needed, because the graph does not know the size of its input {node.target}: pass"
                f" {{{str(node.target)!r}: tensor}}."
            )
        if node.target not in _OF_TRAINING:
            sizes = [size_in_example(size) for size in value.shape]
            inputs[str(node.target)] = torch.ones(sizes, dtype=value.dtype, device=value.device)
    return inputs


def _with_open_sizes(gm: AdaptedGraphModule, inputs: Tensors) -> dict[str, Tensor]:
    """Return inputs in which no open size is one, because torch.export takes a size of one for a constant.

    If one is, each input is repeated to the open sizes that the graph was captured with, which fit each other.
    """
    captured = {str(node.target): node.meta.get("val") for node in gm.flat_graph.find_nodes(op="placeholder")}
    if not all(isinstance(captured.get(name), Tensor) for name in inputs):
        return dict(double_batch_of_one(dict(inputs)) or inputs)
    open_sizes = {
        name: {dim: size_in_example(size) for dim, size in enumerate(captured[name].shape) if not isinstance(size, int)}
        for name in inputs
    }
    fits = all(tensor.dim() == captured[name].dim() for name, tensor in inputs.items())
    if not fits or all(inputs[name].shape[dim] != 1 for name, sizes in open_sizes.items() for dim in sizes):
        return dict(inputs)
    repeated = dict(inputs)
    for name, sizes in open_sizes.items():
        for dim, size in sizes.items():
            tensor = repeated[name]
            indices = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            repeated[name] = tensor.index_select(dim, indices)
    return repeated


def inputs_by_name(inputs: object, name: object = "input_ids") -> ConfigError:
    """Return the error for inputs that are not a dict of tensors, with the name of an argument."""
    return ConfigError(f"inputs is a dict of the model's arguments, {{{name!r}: tensor}}, not {shown(inputs)}.")


def _named_results(graph: fx.Graph, signature: CallSignature | None, left_out: tuple[str, ...]) -> dict[str, fx.Node]:
    """Return the tensors that a graph returns, by the names of the fields and keys at which they are."""
    values: Any = graph.output_node().args[0]
    info: Any = getattr(codegen_of(graph), "pytree_info", None)
    spec = None if info is None else info.out_spec
    if signature is not None and left_out:
        spec = signature.omission(left_out).out_spec
    result = values if spec is None else pytree.tree_unflatten(list(values), spec)
    named = {".".join(map(_step_in, path)): node for path, node in leaves_by_path(result)[0].items()}
    return {name or "output": node for name, node in named.items() if isinstance(node, fx.Node)}


def _step_in(key: Any) -> str:
    """Return the key, index or field that leads into a container."""
    return str(next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key))


def _chosen(results: Mapping[str, fx.Node], outputs: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the results that are asked for; a name stands for all that it contains."""
    if outputs is None:
        return tuple(results)
    chosen: list[str] = []
    for asked in (outputs,) if isinstance(outputs, str) else tuple(outputs):
        found = [name for name in results if name == asked or name.startswith(f"{asked}.")]
        if not found:
            raise ConfigError(f"The model does not return {asked!r} in this call; it returns {', '.join(results)}.")
        chosen += found
    return tuple(chosen)
