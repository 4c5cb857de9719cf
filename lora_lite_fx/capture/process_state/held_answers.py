"""Let a graph hold for the answers alone that its model got from the process when it was captured.

A model may ask whether autocast is on. Its graph goes one way, and refuses calls in which the model would go another.
What a model asks of the default dtype without a word, by making tensors, shows in its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from ...errors import COMPILE_INSTEAD, CallError, CaptureError
from ...graph.tensors import attribute_of
from ..comparable import revealed
from ..differences import TOLERANCES, distance, largest
from ..outputs import Call, outputs_of_graph, outputs_of_model
from .questions import AUTOCAST, DETERMINISTIC, DTYPE, GRAD, INFERENCE, INFERENCE_REGION, Questions, device_of

_ANSWERS: dict[str, Callable[[str], Any]] = {
    AUTOCAST: lambda device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    INFERENCE: lambda device: torch.is_inference_mode_enabled(),
    DTYPE: lambda device: torch.get_default_dtype(),
    DETERMINISTIC: lambda device: torch.are_deterministic_algorithms_enabled(),
}
"""What a model may ask, with the answer of now for a type of device."""

_HALF = TOLERANCES[torch.bfloat16]
"""How far results may be apart under autocast, relative to the largest value."""


class HeldAnswer(NamedTuple):
    """The arguments of `require_answer` in a graph."""

    kind: str
    device: str
    answer: object
    message: str


@has_side_effect
def require_answer(kind: str, device: str, answer: Any, message: str) -> None:
    """Raise an error if the process answers otherwise in this call.

    Raises:
        CallError: with `message`.
    """
    if _ANSWERS[kind](device) != answer:
        raise CallError(message)


def hold_answers(gm: fx.GraphModule, model: nn.Module, call: Call, questions: Questions) -> None:
    """Let the graph refuse calls in which the process answers otherwise, where the model asks and would differ then.

    Raises:
        CaptureError: the model runs a part of itself in inference mode.
    """
    device = device_of(model)
    for kind, line in questions.asked.items():
        if kind == INFERENCE_REGION:
            raise CaptureError(
                f"{type(model).__name__} runs a region of {kind} at {line}, and a graph has none. The way out:"
                f" torch.no_grad() instead, or {COMPILE_INSTEAD}."
            )
        if kind == GRAD:  # the model was traced with gradients, and compared without
            continue
        other = _other_answer(kind, device)
        try:
            with other or nullcontext():
                same = other is not None and _computes_the_same(gm, model, call)
        except Exception:  # of the graph or the model, in a state in which it may never be called
            same = False
        if not same:
            _hold_answer(gm, model, kind, device, line)


def _computes_the_same(gm: fx.GraphModule, model: nn.Module, call: Call) -> bool:
    """Tell whether graph and model agree in evaluation as far as half precision goes, in whatever types of results."""
    with revealed(model, gm):
        expected = outputs_of_model(model, call, False, in_any_order=False).results
        actual = outputs_of_graph(gm, model, call, False, by_module=False, in_any_order=False).results
    for name, theirs in expected.items():
        ours = actual.get(name)
        if isinstance(theirs, Tensor) and isinstance(ours, Tensor) and theirs.is_floating_point():
            ours, theirs = ours.float(), theirs.float()
        if distance(ours, theirs) > _HALF * largest(theirs):
            return False
    return True


def _other_answer(kind: str, device: str) -> AbstractContextManager[Any] | None:
    """Return a context in which this thread gets another answer; None if the whole process would."""
    if kind == INFERENCE:
        return torch.inference_mode(not torch.is_inference_mode_enabled())
    if kind == AUTOCAST and torch.amp.is_autocast_available(device):
        return torch.autocast(device, torch.bfloat16, enabled=not torch.is_autocast_enabled(device))
    return None


def _hold_answer(gm: fx.GraphModule, model: nn.Module, kind: str, device: str, line: str) -> None:
    """Insert a node into `gm` that refuses calls in which the process answers otherwise than now."""
    answer = _ANSWERS[kind](device)
    message = (
        f"{type(model).__name__} asks {kind} at {line}, and its graph holds for the answer of its capture alone: it is"
        f" {answer} there, and another one in this call. The way out: capture the model in the state in which it is"
        f" called, or {COMPILE_INSTEAD}."
    )
    inputs = gm.graph.find_nodes(op="placeholder", sort=True)
    with gm.graph.inserting_before(inputs[-1].next if inputs else gm.graph.output_node()):
        gm.graph.call_function(require_answer, (kind, device, answer, message))
    gm.recompile()


def held_answers(graph: fx.Graph) -> tuple[HeldAnswer, ...]:
    """Return the answers that a graph holds for."""
    return tuple(HeldAnswer(*node.args) for node in graph.find_nodes(op="call_function", target=require_answer))


def other_than_held(held: Iterable[HeldAnswer]) -> str:
    """Return why a call of now is refused by these answers; empty if it is not."""
    return next((each.message for each in held if _ANSWERS[each.kind](each.device) != each.answer), "")


_FACTORIES = frozenset(
    {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
)
_CASTS = frozenset({"_to_copy", "to", "type_as", "float", "double", "half", "bfloat16"})
"""Operators that always say the type of their result."""


def default_dtype_of(gm: fx.GraphModule, model: nn.Module) -> torch.dtype | None:
    """Return the default type under which `gm` was captured just now; None if nothing in it depends on that.

    What may depend on it is a value of that type that is made of no value of a floating-point type: of sizes, of
    numbers, of integers by a division, or as a constant of the model's code.

    Args:
        gm: the graph.
        model: what it was captured from.
    """
    default = torch.get_default_dtype()
    named = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in named:
            constant = attribute_of(gm, str(node.target))
            if isinstance(constant, Tensor) and constant.dtype == default:
                return default
        elif node.op.startswith("call_") and _makes(node, default):
            return default
    return None


def _makes(node: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether a call makes a value of this type of none of a floating-point type."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    value = node.meta.get("val")
    if value is None:  # traced symbolically
        return node.op == "call_function" and name in _FACTORIES
    inputs = [each.meta.get("val") for each in node.all_input_nodes]
    if any(isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) for each in inputs):
        return False
    return isinstance(value, Tensor) and value.dtype == dtype and name not in _CASTS


def other_default_dtype(captured: torch.dtype | None) -> str:
    """Return in words how the default type of now differs from that of a graph that depends on it; empty if not."""
    now = torch.get_default_dtype()
    if captured in (None, now):
        return ""
    return f"torch.get_default_dtype() is {now}, and was {captured} when the graph was captured, which depends on it"
