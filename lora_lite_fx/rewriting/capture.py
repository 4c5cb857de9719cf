"""`capture`: make the graph of a model, before any adapter is inserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.changed_buffers import base_buffers_of
from ..adapters.placement import adapter_tensor_names
from ..adapters.state import adapter_tensors
from ..capture.capture_model import Capture, Inputs, capture_model, without_what_cannot_be
from ..capture.compare import follows_each_part, require_equal
from ..capture.graph_calls import call_like_the_model
from ..capture.model_record import ModelRecord
from ..capture.origins.hooks import check_hooks
from ..capture.origins.origin import is_diffusers, is_hugging_face
from ..capture.origins.wrong_arguments import check_model
from ..capture.process_state.held_answers import default_dtype_of
from ..capture.process_state.python_state import state_put_back
from ..errors import CaptureError
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.module_checks import absent_tensors
from ..execution.optimize import checkpoints_layers, execution_of
from ..graph.calls_and_traces import collection_put_off
from ..graph.layers import require_layers
from ..graph.modes import let_modes_be_one, set_modes
from ..graph.tensors import keep_registration, outside_inference_mode, tensor_of
from ..graph.writes import own_buffers, written_buffers
from ..passes import DropEmptyParts, DropMetadataAsserts, FollowMode, InlineRegions, Pipeline
from .merged_model import save_as_model


@outside_inference_mode()
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    checkpoint_layers: bool | None = None,
    fuse_loss: bool | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Capture `model` as a graph, without adapters.

    `rewrite`, `wrap`, `load`, `load_peft`, `load_lora_lite` and `inspect` take the graph in place of the model. So one
    capture serves several of them, and its settings are said once.

    Args:
        model: any module, which is not changed; or an exported program. A graph module is copied as it is: the
            adapters of a rewritten graph become copies of their own.
        example_inputs: a tuple of positional or a dict of keyword arguments to capture with. Without them, a Hugging
            Face model is captured on inputs made from its config (`input_ids`, `attention_mask`, `labels`; no cache),
            and any other module by symbolic tracing.
        dynamic_shapes: `"auto"` for every dimension that can be dynamic, None for fixed shapes, or an argument for
            `torch.export.export`. `"auto"` keeps height and width of images fixed for Hugging Face models that cut them
            into windows, because their captures would take minutes.
        checkpoint_layers: keep only the inputs of each layer for the backward pass and run the layer again in it: less
            memory, about a third more time, the same gradients. A layer is a member of what `layers` of a config
            counts. None to do as `model` does: a Hugging Face model after `gradient_checkpointing_enable()`, or a graph
            that was captured so.
        fuse_loss: compute head and loss as one operation in training mode, as `rewrite` does. None to do as `model`
            does, if that is a graph.
        verify: compare the graph with the model on the example inputs, in training and in evaluation mode. That takes
            a forward pass each of model and graph, and finds models that compute something else while they are traced,
            or that ask the process how they are called, as whether autocast is on. It is left out without example
            inputs, and for models without data (on the meta device). With False nobody notices such models: the graph
            has the answers of its capture, and gives them in every call.

    Returns:
        A graph module over the model's own weights, each part in the mode of the model's; no parameter requires grad
        but those of adapters. It is called like the model: optional arguments stay optional. Buffers that the graph
        writes to are copies, so that training it leaves the model alone.

    Raises:
        CaptureError: the model cannot be captured, the inputs do not fit it, it has no layers to checkpoint, or hooks
            of accelerate stand on it. Or the graph computes something else than the model: the message names the first
            module whose output differs. Or the model itself raises for the example inputs in both modes; or it asks
            the process, or keeps in Python for its next call, what a graph would have as a constant.

    Warns:
        UserWarning: a hook stands on a module of the model. It was traced; the message says what that means. Or the
            model counts its calls, and two calls in a row compute the same.
    """
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule):
        check_hooks(model)
    return base_graph(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        checkpoint_layers=checkpoint_layers,
        fuse_loss=fuse_loss,
        verify=verify,
    )


_TAKEN = {name for name in dir(AdaptedGraphModule) if not hasattr(nn.Module, name)} | {"meta"}
"""The attributes of a graph module that other modules do not have; torch.fx sets `meta` on each."""


def _check_can_be_a_graph(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise `CaptureError` if a module has adapters, or at its root a name that a graph module needs."""
    if adapter_names:
        raise CaptureError(
            f"{type(model).__name__} is wrapped eagerly already, or adapted. The way out: start from the model that"
            " it was made of, and pass several configs at once. Or, to give an adapted model a further adapter:"
            " llfx.add(model, {'name': cfg})."
        )
    at_root = (model.named_children(), model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    if taken := [name for named in at_root for name, _ in named if name in _TAKEN]:
        raise CaptureError(
            f"{type(model).__name__} has {taken[0]!r} at its root, and a graph module has an attribute of that name, so"
            f" the graph could not read it. The way out: rename it, or capture a module that holds the model, such as"
            f" nn.Sequential(model): there it is '0.{taken[0]}'."
        )


@collection_put_off()
def base_graph(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    dynamic_shapes: Any = "auto",
    checkpoint_layers: bool | None = None,
    fuse_loss: bool | None = None,
    verify: bool = True,
    made: bool = False,
    made_from: ModelRecord | None = None,
) -> fx.GraphModule:
    """Do the work of `capture`, without a warning of hooks: for those who read the graph and do not run it.

    Args:
        made: whether the example inputs are not the user's, so that it is no mistake of theirs if the model raises.
        made_from: what the graph remembers, if `model` is not the model to remember.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    check_model(module)
    adapter_names = adapter_tensor_names(module)
    if not isinstance(module, fx.GraphModule):
        _check_can_be_a_graph(module, adapter_names)
    elif adapter_names:
        adapter_tensors(module)  # refuses a graph around the adapted one, as torch.export makes it

    def attempt(without: Sequence[str]) -> fx.GraphModule:
        with torch.enable_grad():  # which a model may ask; it is compared without gradients
            captured = capture_model(module, example_inputs, dynamic_shapes, adapter_names, without, made)
        made_inputs = made or example_inputs is None
        return _graph_of(module, captured, checkpoint_layers, fuse_loss, verify, made_inputs, made_from)

    with state_put_back(module):  # runs and traces may change what the user's classes and files hold
        return without_what_cannot_be(module, example_inputs, attempt)


def _graph_of(
    model: nn.Module,
    captured: Capture,
    checkpoint_layers: bool | None,
    fuse_loss: bool | None,
    verify: bool,
    made: bool,
    made_from: ModelRecord | None,
) -> fx.GraphModule:
    """Return a captured model as one graph for both modes, with what it runs by; compared with the model."""
    plain = Pipeline((InlineRegions(), DropMetadataAsserts(), DropEmptyParts()))
    plain.run(captured.gm)
    if captured.eval_gm is not None:
        plain.run(captured.eval_gm)
        Pipeline((FollowMode(captured.eval_gm.graph),)).run(captured.gm)
    if checkpoint_layers is None:
        checkpoint_layers = checkpoints_layers(model)
    if checkpoint_layers:
        require_layers(captured.gm)
    # What torch.export builds refuses train() and eval(); a module of our own over the same graph does not.
    execution = replace(execution_of(model), checkpoint_layers=checkpoint_layers)
    if fuse_loss is not None:
        execution = replace(execution, fuse_loss=fuse_loss)
    if captured.source is not None:  # else `model` is a graph, and has these
        execution = replace(
            execution,
            made_from=made_from or ModelRecord.of(model),
            save_as_model=save_as_model if is_hugging_face(model) or is_diffusers(model) else None,
            held=captured.held,
            absent=absent_tensors(captured.source),
            default_dtype=default_dtype_of(captured.gm, captured.source),
        )
    if captured.signature is not None:
        execution = replace(execution, signature=captured.signature)
        call_like_the_model(captured.gm.graph, captured.signature)
    gm = AdaptedGraphModule(captured.gm, captured.gm.graph, execution)
    keep_registration(captured.gm, gm)
    _own_what_calls_change(gm, model)
    set_modes(gm, captured.modes)
    if isinstance(model, AdaptedGraphModule):
        gm.switches = model.switches
    if verify and captured.source is not None and captured.calls:
        same_in_both_modes = captured.eval_gm is None
        require_equal(gm, captured.source, captured.calls, captured.hint, made, same_in_both_modes)
        if not follows_each_part(gm, captured.source, captured.calls[0]):
            let_modes_be_one(gm, captured.modes)
            set_modes(gm, captured.modes)
    return gm


def _own_what_calls_change(gm: AdaptedGraphModule, model: nn.Module) -> None:
    """Give `gm` copies of the buffers that calls change, and note the base's: `model` knows them if it has adapters."""
    names = written_buffers(gm)
    if adapter_tensor_names(model):
        known = base_buffers_of(model)
        gm.base_buffers = {name: known.get(name) for name in dict.fromkeys((*names, *known))}
    else:
        gm.base_buffers = {name: tensor_of(gm, name) for name in names}
    own_buffers(gm, gm.base_buffers)
