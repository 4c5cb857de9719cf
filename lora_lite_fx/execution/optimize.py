"""`optimize`, and copies of a graph over the same tensors that run in another way."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn
from torch.export import ExportedProgram

from ..adapters.changed_buffers import base_buffers_of
from ..adapters.placement import HasGraphs, placements
from ..adapters.switches import HasSwitches
from ..errors import AdapterError, ConfigError, shown
from ..graph.copies import copy_graph
from ..graph.tensors import keep_registration
from ..passes import OPTIMIZATIONS, Pipeline
from .adapted_graph_module import AdaptedGraphModule
from .execution import Execution


def optimize(model: fx.GraphModule | ExportedProgram, passes: Pipeline = OPTIMIZATIONS) -> fx.GraphModule:
    """Return the same adapted model over the same tensors, optimized by `passes`.

    All passes optimize the models that `rewrite` and `load` return. This function leaves out some of them,
    `optimize(gm, OPTIMIZATIONS.without("share_siblings"))`, or all, `optimize(gm, Pipeline(()))`. It also optimizes a
    graph from a `.pt2` file again, because such a file holds only the plain graph.

    Args:
        model: the result of `rewrite` or `load`, or an exported program of it. It is not changed. The result has its
            parameters, not copies of them, so that an optimizer of the one serves the other.
        passes: from `lora_lite_fx.passes`; they change only how the graph is run, not `model.graph`. With inputs to
            check, the passes run and are checked now, and again when a program is derived anew. Programs of calls that
            leave out other arguments than the inputs do are not checked.

    Raises:
        AdapterError: `model` is not a graph.
        PassError: a check found a pass that changes what the graph computes.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    if not isinstance(passes, Pipeline):
        raise ConfigError(f"optimize takes a Pipeline of passes, not {shown(passes)}.")
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"optimize takes a graph that rewrite, load or torch.export returned, not {shown(model)}."
            f"{_optimize_hint(model)}"
        )
    execution = replace(execution_of(model), passes=passes, checkpoint_layers=checkpoints_layers(model))
    result = run_as(model, execution)
    result.derive_checked()
    return result


def _optimize_hint(model: object) -> str:
    if isinstance(model, HasGraphs):
        return " The graphs of an adapted model are optimized already."
    if isinstance(model, nn.Module) and not placements(model):
        return " Only adapters are optimized: optimize(rewrite(model, LoRA(r=8)))."
    return ""


def run_as(model: fx.GraphModule, execution: Execution) -> AdaptedGraphModule:
    """Return the same graph over the same tensors, not copies of them, in the same modes, run as `execution` says."""
    result = AdaptedGraphModule(model, model.graph, execution)
    keep_registration(model, result)
    result.base_buffers = base_buffers_of(model)
    if isinstance(model, HasSwitches):
        result.switches = model.switches
    return result


def draft_of(gm: AdaptedGraphModule) -> AdaptedGraphModule:
    """Return a copy of a graph over the same tensors, to be changed and then taken over, see `take_over`."""
    assert gm.execution is not None
    draft = AdaptedGraphModule(gm, copy_graph(gm.graph), gm.execution)
    keep_registration(gm, draft)
    return draft


def execution_of(model: object) -> Execution:
    """Return the execution of `model`, or the default one if `model` is not an `AdaptedGraphModule`."""
    return (isinstance(model, AdaptedGraphModule) and model.execution) or Execution()


def checkpoints_layers(model: nn.Module | ExportedProgram) -> bool:
    """Check whether `model`, a graph or a Hugging Face model, checkpoints its layers."""
    return execution_of(model).checkpoint_layers or (
        isinstance(model, nn.Module)
        and any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    )
