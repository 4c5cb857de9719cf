"""Follow the rows of the batch through a graph: which dimension of each value counts them, and in which order.

An adapter of one row may be used only where the graph proves which row a slice is. A size proves nothing, because a
permutation keeps it. So each operator is asked what it does to rows, see `operator_rules.py`.

- It computes each row of the same row of its operands, whichever dimension counts them. Then the one dimension of its
  result that has the size of the rows counts them.
- It works along some dimensions, and leaves the others apart.
- It lays the same elements out in another shape. The order of the elements tells where the rows are.
- It picks entries by number, or sorts them. Sorted rows are followed, so that putting them back in order is seen.

After any other operator the rows are lost, and so they are in all that is computed from its result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...graph.insertion import insertions, is_inserted
from ...graph.regions import AUTOCAST_REGION, GRAD_REGION
from ...graph.tensors import attribute_of
from ...graph.writes import may_return_a_view, written_operands
from .operator_classes import SHAPE_OF_OTHER, STATISTICS, plain_name
from .operator_rules import BATCH, Lost, RowRules, Rows, State, lost

ROWS_LOST = "lora_lite_fx_rows_lost"
"""The key of what loses the rows before an input of a graph, in the meta of the input."""

_Results = list[tuple[State, Any]]
"""States of values, each with the memory that the value is a view of."""


class RowFlow:
    """The rows of the batch in the values of a graph. Adapters count as functions of each vector, as they have to be.

    Args:
        graph: the graph, with shapes.
        batch: the names of the size of the batch.
    """

    def __init__(self, graph: fx.Graph, batch: Iterable[str]) -> None:
        self._rules = RowRules(batch)
        self._states: dict[fx.Node, State] = {}
        self._memory: dict[fx.Node, Any] = {}
        self._written: dict[Any, tuple[Lost, fx.Node]] = {}  # memory with other rows than before, and who wrote it last
        self._inputs: dict[str, str] = {}  # by the symbol of its rows, the first input
        self._asked = ""
        self._turned: Lost | None = None  # where values that were the same in each row do not stay with their rows
        self._stands_for: dict[fx.Node, fx.Node] = {}
        for each in insertions(graph) if any(map(is_inserted, graph.nodes)) else ():
            sides = ((each.inlet, each.x), (each.outlet, each.y))
            self._stands_for |= {leaving: entered for leaving, entered in sides if leaving and entered}
        self._run(graph)

    def at(self, node: fx.Node) -> State:
        """Return what is known of the rows in the value of a node; None also for a node of another graph."""
        state = self._read(node) if node in self._states else None
        return self._turned if isinstance(state, Rows) and not state.source and self._turned else state

    def is_whole(self, node: fx.Node, rows: Rows) -> bool:
        """Tell whether the dimension counts rows alone, joined with no others."""
        return self._rules.shape(node)[rows.dim] == BATCH

    def others_asked(self, rows: Rows) -> str:
        """Note that these rows are asked for. Return the input of others that were, if they may be other rows."""
        self._asked = self._asked or rows.source
        is_same = not rows.source or self._rules.root(rows.source) == self._rules.root(self._asked)
        return "" if is_same else self._asked

    # The walk.

    def _run(self, graph: fx.Graph, given: _Results | None = None) -> list[State]:
        """Follow the rows through a graph, whose inputs are given but for the outermost, and return its results."""
        inputs = iter(given or ())
        for node in graph.nodes:
            if node.op == "output":
                return [self._read(each) if isinstance(each, fx.Node) else None for each in _flat(node.args[0])]
            self._memory[node] = str(node.target) if node.op == "get_attr" else node
            if node.op == "placeholder":
                self._states[node], self._memory[node] = (self._input(node), node) if given is None else next(inputs)
            elif node in self._stands_for:
                self._states[node] = self._read(self._stands_for[node])
            elif node.op == "get_attr" or is_inserted(node):
                self._states[node] = None
            else:
                if node.all_input_nodes and may_return_a_view(node):
                    self._memory[node] = self._memory[node.all_input_nodes[0]]
                self._states[node] = self._computed(node)
                self._write(node)
        return []

    def _input(self, node: fx.Node) -> State:
        value = node.meta.get("val")
        if ROWS_LOST in node.meta:
            return Lost(node.meta[ROWS_LOST])
        if not isinstance(value, Tensor) or not value.dim() or (size := str(value.shape[0])) not in self._rules.batch:
            return None
        return Rows(0, source=self._inputs.setdefault(size, str(node.target)))

    def _read(self, node: fx.Node) -> State:
        other, writer = self._written.get(self._memory[node], (None, node))
        return self._states[node] if writer is node else other

    def _write(self, node: fx.Node) -> None:
        """Note the memory that a node overwrites with values whose rows are not at the same place."""
        for operand in written_operands(node):
            state = self._states[node]
            if _kept(state) != _kept(self._read(operand)) and plain_name(node) not in STATISTICS:
                self._written[self._memory[operand]] = state if isinstance(state, Lost) else lost(node), node

    def _computed(self, node: fx.Node) -> State:
        """Return the state of the result of a call."""
        if node.target is operator.getitem:
            source, index = node.args
            parts = self._read(source)  # type: ignore[arg-type]
            return parts[index] if isinstance(parts, list) else parts  # type: ignore[index]
        if node.target in (GRAD_REGION, AUTOCAST_REGION):
            return self._region(node)
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return None  # a number, or nothing
        name = plain_name(node)
        operands = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), (Tensor, list, tuple))]
        operands = operands[:1] if name in SHAPE_OF_OTHER else [] if name.startswith("new_") else operands
        states = {each: self._read(each) for each in operands}
        rows = {each: state for each, state in states.items() if isinstance(state, Rows)}
        missing = sorted((state for state in states.values() if isinstance(state, Lost)), key=lambda each: each.is_one)
        if missing and not missing[0].is_one:
            result: State = missing[0]
        elif any(isinstance(state, list) for state in states.values()):
            result = lost(node)
        elif rows and hasattr(node.target, "autograd_function"):
            result = self._function(node, states)
        elif rows:
            result = self._rules.with_rows(node, name, rows, states)
        else:
            result = self._rules.without_rows(node, name, missing[0] if missing else None)
        if isinstance(result, Lost) and not result.is_one and self._turned is None:
            constant = (each for each, state in rows.items() if not state.source)
            self._turned = result if any(each.meta["val"].is_floating_point() for each in constant) else None
        return result

    def _region(self, node: fx.Node) -> State:
        """Follow the rows through a region with a mode of its own, whose body is a graph module."""
        for place, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                body: Any = attribute_of(node.graph.owning_module, str(argument.target))  # type: ignore[arg-type]
                operands: Any = node.args[place + 1 :]
                is_node = [isinstance(each, fx.Node) for each in operands]
                pairs = zip(operands, is_node, strict=True)
                return self._run(
                    body.graph, [(self._read(n), self._memory[n]) if known else (None, None) for n, known in pairs]
                )
        return lost(node)

    def _function(self, node: fx.Node, states: Mapping[fx.Node, State]) -> State:
        """Follow the rows through the forward of an autograd function, by a trace of its operators."""

        def call(*tensors: Tensor) -> Any:
            of = dict(zip(states, tensors, strict=True))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: of.get(each, each.meta.get("val")))
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with torch.no_grad():
            traced = make_fx(call)(*(each.meta["val"] for each in states))
        results = self._run(traced.graph, [(state, self._memory[each]) for each, state in states.items()])
        return results if isinstance(node.meta["val"], (tuple, list)) else results[0]


def _kept(state: State) -> Any:
    """Return what the states of a value and of what overwrites it have in common if its views need not know of that."""
    return (state.dim, state.place, state.points) if isinstance(state, Rows) else state


def _flat(value: Any) -> list[Any]:
    return [part for each in value for part in _flat(each)] if isinstance(value, (tuple, list)) else [value]
