"""Find the values of arguments for which a model runs other operations than those that symbolic tracing recorded.

Symbolic tracing puts a stand-in in the place of every argument, so it takes the branches of a tensor: of
`x if mask is None else x * mask` it records the product. Python does not say which branches there were. So the model is
traced again with None, True or False in the place of an argument that may have such a value. If the two graphs are the
same then, the graph serves such calls, as it does where a mask is only passed on to attention. If they are not, a node
of the graph raises a `CallError` at such a call, where the graph would compute something else in silence. It is part of
the graph so that every way to run it, `torch.export` among them, has the check.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from ...errors import CallError, CaptureError
from ..process_state.python_state import state_put_back
from .tracer import symbolic_trace

Values = tuple[tuple[str, bool | None], ...]
"""Arguments with the values that they are called with."""

_OTHERWISE = "runs other operations"
_OF_ONE_CALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@has_side_effect
def refuse_call(arguments: Sequence[Any], values: Sequence[bool | None], message: str) -> None:
    """Raise an error if all `arguments` of the call have these `values`.

    Raises:
        CallError: with `message`.
    """
    for argument, value in zip(arguments, values, strict=True):
        if argument is not value:
            return
    raise CallError(message)


def refused_calls(model: nn.Module, traced: fx.GraphModule) -> dict[Values, str]:
    """Return the values of arguments for which `traced` does not compute what the model does; and for each, why.

    Args:
        model: in the mode in which it was traced.
        traced: the result of `symbolic_trace`.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in _OF_ONE_CALL
    }
    refused: dict[Values, str] = {}
    optional: list[tuple[str, bool | None]] = []
    for name, parameter in parameters.items():
        for value in (True, False) if isinstance(parameter.default, bool) else (None,):
            reason = _difference(model, traced, {name: value})
            if reason is None and value is parameter.default:
                optional.append((name, value))
            # Where the model itself raises for a value, its graph need not say more.
            if reason == _OTHERWISE or (reason is not None and value is parameter.default):
                refused[((name, value),)] = reason
    for values in _sets(optional):
        known = any(set(fewer) <= set(values) for fewer in refused)
        if not known and (reason := _difference(model, traced, dict(values))):
            refused[values] = reason
    return refused


def refuse_in_graph(model: nn.Module, gm: fx.GraphModule, refused: Mapping[Values, str]) -> None:
    """Insert a node for each of these calls into `gm`, which raises the error of such a call."""
    if not refused:
        return
    placeholders = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
    for values, reason in refused.items():
        arguments = tuple(placeholders[name] for name, _ in values)
        with gm.graph.inserting_after(list(placeholders.values())[-1]):
            check = (arguments, tuple(value for _, value in values), _message(model, values, reason))
            gm.graph.call_function(refuse_call, check)
    gm.recompile()


def _sets(optional: Sequence[tuple[str, bool | None]]) -> Iterator[Values]:
    """Return the sets of several arguments to leave out: all of them, and all but one.

    A branch that is taken without some arguments, whatever the others are, shows without all of them.
    """
    sizes = {size for size in (len(optional) - 1, len(optional)) if size > 1}
    return itertools.chain.from_iterable(itertools.combinations(optional, size) for size in sorted(sizes))


def _difference(model: nn.Module, traced: fx.GraphModule, values: Mapping[str, bool | None]) -> str | None:
    """Return what the model does otherwise than its graph if arguments have these values; None if nothing."""
    try:
        with state_put_back(model):
            expected = symbolic_trace(model, values)
    except CaptureError as error:
        return f"raises an error when it is traced so: {error.__cause__}"
    return None if same_graphs(traced, expected, values) else _OTHERWISE


def same_graphs(traced: fx.GraphModule, expected: fx.GraphModule, values: Mapping[str, bool | None]) -> bool:
    """Tell whether the graphs are the same node for node, with these values in the place of arguments of `traced`."""
    if len(traced.graph.nodes) != len(expected.graph.nodes):
        return False
    twins: dict[fx.Node, Any] = {}
    for node, twin in zip(traced.graph.nodes, expected.graph.nodes, strict=True):
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        if node.op == "get_attr" and not same_tensor(traced, expected, node.target, twin.target):
            return False
        if node.op != "placeholder":
            arguments = fx.node.map_arg((node.args, node.kwargs), twins.__getitem__)
            if arguments != (twin.args, twin.kwargs):
                return False
        twins[node] = values.get(node.target, twin) if node.op == "placeholder" else twin
    return True


def same_tensor(traced: fx.GraphModule, expected: fx.GraphModule, name: str, in_expected: str) -> bool:
    """Tell whether two graphs have the same tensor, or equal ones, under these names."""
    one, other = operator.attrgetter(name)(traced), operator.attrgetter(in_expected)(expected)
    return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))


def _message(model: nn.Module, values: Values, reason: str) -> str:
    call = " and ".join(f"{name}={value}" for name, value in values)
    names = ", ".join(name for name, _ in values)
    given = {
        name: "..."
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in _OF_ONE_CALL
    }
    for name, value in values:
        given.pop(name, None)
        if value is not None or name in given:
            given[name] = str(value)
    example = ", ".join(f"{name!r}: {value}" for name, value in given.items())
    return (
        f"{call}: the graph of {type(model).__name__} was captured by symbolic tracing, for calls with a tensor as"
        f" {names}, and with {call} the model {reason}. For such calls, capture one:"
        f" rewrite(model, cfg, example_inputs={{{example}}})."
    )
