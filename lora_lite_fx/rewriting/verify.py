"""`verify`: compare a graph with the model that it was made of, module by module."""

from __future__ import annotations

from torch import fx, nn

from ..adapters.placement import placements
from ..capture.capture_model import Inputs, origin_of, split_inputs
from ..capture.compare import differences
from ..capture.differences import DifferenceTable
from ..capture.origins.wrong_arguments import check_model
from ..capture.outputs import has_data
from ..capture.shared_copy import shared_copy
from ..errors import AdapterError, CaptureError, shown
from ..graph.modes import modes_of, set_modes
from .eager import wrap_again


def verify(gm: fx.GraphModule, model: nn.Module, inputs: Inputs) -> DifferenceTable:
    """Compare a graph with its model on inputs of your own, in training, in evaluation, and as their parts are.

    `capture` does so on its example inputs. A model that looks at the values of its inputs may compute something else
    for others. A graph with adapters is compared with the eager wrapper of the model that has the same adapters. Where
    parts of the graph or of the model are in other modes than the rest, the two are compared in these modes too.

    Args:
        gm: the result of `capture`, `rewrite` or `load`; it is not changed.
        model: the model that it was made of; it is not changed.
        inputs: a tuple of positional or a dict of keyword arguments that both take.

    Returns:
        A table with a row for the output of each module and for each result: how far graph and model are apart, and how
        far rounding explains. Results are those of a call of `gm`, outputs of modules those of its flat graph.
        `table.ok` tells whether all results agree.

    Raises:
        AdapterError: `gm` is not a graph, or has adapters and `model` is not the model that it was made of.
        CaptureError: the inputs do not fit the model, or there is no data to compare (on the meta device).
        CallError: the graph does not serve a call with these inputs.
        ConfigError: `gm` has adapters at a site that cannot be wrapped eagerly.
    """
    if not isinstance(gm, fx.GraphModule):
        raise AdapterError(
            f"verify compares a graph that capture, rewrite or load returned, not {shown(gm)}. The way out:"
            " verify(rewrite(model, cfg), model, inputs)."
        )
    check_model(model)
    twin = wrap_again(gm, model) if placements(gm) else shared_copy(model)
    origin_of(model).prepare(twin)
    if len(set((modes := modes_of(gm)).values())) > 1:
        set_modes(twin, modes)
    call = split_inputs(twin, inputs)
    if not has_data(twin, call):
        raise CaptureError(f"{type(model).__name__} or its inputs have no data, so there is nothing to compare.")
    rows, notes = differences(gm, twin, call)
    return DifferenceTable(tuple(rows), type(model).__name__, tuple(notes))
