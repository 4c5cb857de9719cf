"""The graph of a model before any adapter is inserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.placement import adapter_tensor_names
from ..capture.capture import Inputs, capture
from ..capture.signature import call_like_the_model
from ..errors import CaptureError
from ..execution.checkpointing import require_layers
from ..execution.module import AdaptedGraphModule, checkpoints_layers, execution_of
from ..graph.tensors import keep_aliases
from ..graph.writes import own_written_buffers
from ..passes import (
    DropMetadataAsserts,
    FollowMode,
    InlineRegions,
    Pipeline,
)


def base_graph(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = "auto",
    checkpoint_layers: bool | None = None,
) -> fx.GraphModule:
    """The model as a graph, before any adapter is inserted. Arguments and errors as for `rewrite`.

    Parameters share the model's storage and require no grad (adapters that are there already are copied and do).
    Buffers that the graph writes to are copies, so that training it leaves the model alone.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    own = adapter_tensor_names(model) if isinstance(model, nn.Module) else []
    if own and not isinstance(model, fx.GraphModule):
        raise CaptureError(
            f"{type(model).__name__} is wrapped eagerly already, or adapted. The way out: start from the model that"
            " it was made of, and pass several configs at once."
        )
    captured = capture(model, example_inputs, dynamic_shapes, own)
    plain = Pipeline((InlineRegions(), DropMetadataAsserts()))
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
    if captured.signature is not None:
        execution = replace(execution, signature=captured.signature)
        call_like_the_model(captured.gm.graph, captured.signature)
    gm = AdaptedGraphModule(captured.gm, captured.gm.graph, execution)
    keep_aliases(captured.gm, gm)
    own_written_buffers(gm)
    return gm.train(captured.training)
