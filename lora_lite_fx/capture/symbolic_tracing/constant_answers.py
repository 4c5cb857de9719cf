"""Refuse to trace symbolically what a graph would make a constant and the model does not.

Symbolic tracing runs the model once. What the model asks of the process, and what it keeps in Python from one call to
the next, has one value then. A further trace with another value shows whether the graph depends on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from ...compat.torch import SET_GRAD_ENABLED, pytree
from ...compat.torch_modules import buffers_of
from ...errors import COMPILE_INSTEAD, CaptureError
from ..process_state.python_state import PythonState, new_parameter, state_put_back, warn_of_count
from ..process_state.questions import AUTOCAST, GRAD, INFERENCE_REGION, Questions, device_of
from .branches import same_graphs, same_tensor
from .tracer import recorded, symbolic_trace

_NUMBERS = (int, float, complex)


def trace_without_constants(model: nn.Module) -> fx.GraphModule:
    """Return what `symbolic_trace` returns.

    Raises:
        CaptureError: the model cannot be traced or makes parameters, or the graph would have a constant where the model
            asks the process or changes its own state.

    Warns:
        UserWarning: the model changes a value in each call, such as a count, and nothing shows what it is for.
    """
    questions, parameters = Questions(), [*model.parameters()]
    with state_put_back(model) as state:
        with questions.watched():
            gm = symbolic_trace(model)
        if made := new_parameter(model, parameters):
            raise CaptureError(f"{type(model).__name__} {made}")
        _require_no_state(model, gm, state)
    for kind, line in questions.asked.items():
        if kind == INFERENCE_REGION:
            raise _refusal(model, f"runs a region of {kind} at {line}, and a graph has none", "torch.no_grad() instead")
        if not _is_without_effect(model, kind):
            what = f"asks {kind} at {line}, and a graph would keep the answer of its capture for good"
            raise _refusal(model, what, "decide by an argument or by self.training")
    return gm


def _is_without_effect(model: nn.Module, kind: str) -> bool:
    """Tell whether another answer gives the same graph."""
    others: dict[str, AbstractContextManager[Any]] = {GRAD: torch.no_grad()}
    if torch.amp.is_autocast_available(device := device_of(model)):
        others[AUTOCAST] = torch.autocast(device, torch.bfloat16)
    if kind not in others:
        return False
    with torch.enable_grad():
        before = _traced(model)
        with others[kind]:
            after = _traced(model)
    return before is not None and after is not None and same_graphs(before, after, {})


def _traced(model: nn.Module) -> fx.GraphModule | None:
    """Return a graph in which it does not matter to which mode of autograd a region goes back; None if none is made."""
    try:
        with state_put_back(model):
            gm = recorded(model)
    except CaptureError:
        return None
    for node in gm.graph.find_nodes(op="call_function", target=SET_GRAD_ENABLED):
        node.args = (None,)
    return gm


def _require_no_state(model: nn.Module, gm: fx.GraphModule, state: PythonState) -> None:
    """Check what a trace has left in the model, by a second trace from there on."""
    changes = state.changes()
    if not changes:
        return
    for change in changes:
        if isinstance(change.now, fx.Proxy) and _is_registered(model, change.name):
            what = f"assigns to its buffer {change.name}{change.line}, which symbolic tracing does not follow"
            raise _refusal(model, what, "pass example_inputs; write to the buffer in place")
    after = PythonState(model)
    try:
        again = symbolic_trace(model)
        same = same_graphs(gm, again, {})
    except CaptureError:
        same = False
    if not same:
        what = (
            f"keeps {changes[0].name} from one call for the next{changes[0].line}, and a graph would keep the value of"
        )
        raise _refusal(model, f"{what} its capture for good", "pass it in and out of forward")
    if counts := [change for change in after.changes() if change.is_count]:
        warn_of_count(model, counts[0])


def require_same_constants(model: nn.Module, gm: fx.GraphModule) -> None:
    """Raise `CaptureError` if a second trace of `model` has other constants than `gm`: of a clock, of an iterator."""
    with state_put_back(model):
        other = _has_other_constants(gm, symbolic_trace(model))
    if other:
        what = "computes with other numbers each time it is traced, as of a clock or a generator in Python, and a graph"
        raise _refusal(model, f"{what} would keep those of its capture for good", "pass them to forward")


def _has_other_constants(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Tell whether two traces of a model differ in numbers or tensors, or in how many operations there are."""
    if len(one.graph.nodes) != len(other.graph.nodes):
        return True
    for node, twin in zip(one.graph.nodes, other.graph.nodes, strict=True):
        if node.op != twin.op or (node.op == "get_attr" and not same_tensor(one, other, node.target, twin.target)):
            return True
        constants, now = (
            [leaf for leaf in pytree.tree_leaves((each.args, each.kwargs)) if isinstance(leaf, _NUMBERS)]
            for each in (node, twin)
        )
        if repr(constants) != repr(now):  # as text, because NaN is not equal to itself
            return True
    return False


def _is_registered(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in buffers_of(model.get_submodule(path))


def _refusal(model: nn.Module, what: str, way_out: str) -> CaptureError:
    return CaptureError(f"{type(model).__name__} {what}. The way out: {way_out}; or {COMPILE_INSTEAD}.")
