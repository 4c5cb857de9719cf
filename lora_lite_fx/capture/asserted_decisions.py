"""Assert in a graph that the model decides by values as it did when it was captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..compat.torch import ASSERT_ASYNC, assert_async
from ..graph.queries import is_deterministic
from ..graph.subgraph import extract, forward_of
from ..graph.walk import ancestors
from ..graph.writes import overwritten_tensors

_DECIDED = "This graph was captured where"


def assert_decision(truth: Tensor, expected: bool, where: str) -> None:
    """Assert, in the forward that is traced, that a call decides as the example.

    Args:
        truth: what the model decides by, a tensor of one truth value.
        expected: its value in the example.
        where: the line of the model.
    """
    message = f"{_DECIDED} {where} goes by {expected}, and is {not expected} in this call. The way out: pass"
    message += " example_inputs of this kind, and capture a graph for them."
    assert_async(truth if expected else truth.logical_not(), message)


def is_other_decision(error: Exception | str) -> bool:
    """Tell whether `error` of a graph says that the model decides otherwise for a call than for the example."""
    return _DECIDED in str(error)


def decisions_on_inputs(gm: fx.GraphModule) -> Callable[..., str]:
    """Return a function that tells whether the model decides on the inputs of a call as on those of the example.

    It knows the decisions that follow from inputs and buffers alone. The others come out only when the graph runs.

    Returns:
        A function of a module with the tensors of `gm`, and of the inputs of the graph. It returns what the graph would
        raise, or an empty text.
    """
    asserts = gm.graph.find_nodes(op="call_function", target=ASSERT_ASYNC)
    decided = {node.args[0]: str(node.args[1]) for node in asserts if str(node.args[1]).startswith(_DECIDED)}
    if not decided:
        return lambda module, *inputs: ""
    overwritten = [node for node, _ in overwritten_tensors(gm, gm.graph)]  # as `extract` does not follow writes
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}

    def is_known(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.target not in parameters and all(other and other.target != node.target for other in overwritten)
        return node not in overwritten and (node.op == "placeholder" or is_deterministic(node))

    known = {node: message for node, message in decided.items() if all(map(is_known, ancestors([node])))}
    conditions = forward_of(gm, extract(gm.graph.find_nodes(op="placeholder"), list(known)))

    def refusal(module: nn.Module, *inputs: Any) -> str:
        found = zip(known.values(), conditions(module, *inputs), strict=True)
        return next((message for message, holds in found if not holds), "")

    return refusal
