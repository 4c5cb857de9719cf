"""Infer the roles of linears from the dataflow of the graph, never from names.

The inference rests on three things: the arguments and results of attentions (`attention.py`), the residual stream
(`dataflow.py`), and *feed-forward* blocks, which are an activation between a linear and one that writes the residual
stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from ..graph.copies import copy_graph
from ..graph.insertion import insertions, is_inserted, take_out
from ..graph.walk import walk
from .attention import give_attention_roles
from .dataflow import ACTIVATIONS, ARITHMETIC, CARRY, CASTS, SOFTMAXES, SPLITS, Dataflow, LinearNode

ROLES: Mapping[str, str] = {
    "query": "its output is the query of an attention",
    "key": "its output is the key of an attention",
    "value": "its output is the value of an attention",
    "output": "it reads the result of an attention",
    "gate": "its output is activated and multiplied with another linear's",
    "up": "its output, activated or gated, is read by a linear that writes the residual stream",
    "down": "it reads activated outputs of linears and writes the residual stream",
    "router": "its output chooses experts",
    "head": "its output is the model's output",
    "reader": "it reads the residual stream",
    "writer": "its output is added to the residual stream",
    "inner": "it neither reads nor writes the residual stream",
}
"""The roles, each with its meaning. A fused projection has several."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
"""Names for several roles at once."""

FINE = frozenset(role for group in GROUPS.values() for role in group)
"""The roles of attentions and feed-forwards."""

COARSE = frozenset({"reader", "writer", "inner"})
"""The roles that say nothing but where a linear is: a site with these alone is of unknown role."""


def infer_roles(graph: fx.Graph, linears: Iterable[LinearNode]) -> None:
    """Fill the `reasons` of every linear, from roles to reasons. Roles that are in doubt are left out.

    Adapters do not count, whatever they compute: the roles are those in the base.
    """
    flow = Dataflow(*_without_adapters(graph, list(linears)))
    give_attention_roles(flow)
    _give_stream_roles(flow)
    _give_feed_forward_roles(flow)
    _give_router_role(flow)
    _give_head_role(flow)


def _without_adapters(graph: fx.Graph, linears: list[LinearNode]) -> tuple[fx.Graph, list[LinearNode]]:
    """Return the graph of the base, and its linears, which fill the same `reasons`."""
    if not any(map(is_inserted, graph.nodes)):
        return graph, linears
    base = copy_graph(graph)
    copies = dict(zip(graph.nodes, base.nodes, strict=True))
    replaced = take_out(insertions(base))
    base.owning_module = graph.owning_module  # not before, because `insertions` would look into its inner graphs

    def in_base(node: fx.Node) -> fx.Node:
        node = copies[node]
        while node in replaced:
            node = replaced[node]
        return node

    return base, [LinearNode(in_base(linear.x), in_base(linear.y), linear.reasons) for linear in linears]


def _give_stream_roles(flow: Dataflow) -> None:
    """Give the roles reader, writer and inner, if there is a residual stream."""
    stream = flow.joins.keys() | flow.skips
    if not stream:
        return
    for linear in flow.linears:
        if any(node in stream for node in flow.behind(linear.x)):
            linear.give("reader", "its input is carried over from the residual stream")
        if any(node in flow.joins for node in flow.ahead(linear.y)):
            linear.give("writer", "its output is carried into an addition to the residual stream")
        if not linear.reasons.keys() & {"reader", "writer"}:
            linear.give("inner", "its input and output are off the residual stream")


# Feed-forward.


def _give_feed_forward_roles(flow: Dataflow) -> None:
    """Give the roles gate, up and down."""
    for down in flow.linears:
        if "writer" not in down.reasons or "output" in down.reasons:
            continue
        between = list(flow.behind(down.x, CARRY | ACTIVATIONS))
        # A linear is activated if a way from it to `down` leads through an activation.
        activated: list[LinearNode] = []
        for node in between:
            if flow.ops[node] in ACTIVATIONS and node not in flow.by_y:
                activated += flow.sources(node, CARRY | ACTIVATIONS)
        # A block whose input comes from another operation on data, such as a recurrence, is not a feed-forward block.
        ends = (n for n in between if n in flow.data and n not in flow.by_y and flow.ops[n] not in CARRY | ACTIVATIONS)
        if not activated or any(True for _ in ends):
            continue
        plain = [linear for linear in flow.sources(down.x) if all(linear is not other for other in activated)]
        down.give("down", "it reads activated outputs of linears and writes the residual stream")
        for linear in activated:
            split = any(flow.ops[n] in SPLITS | {"glu"} and n in between for n in linear.y.users)
            if plain or split:
                linear.give("gate", f"its output is activated and gates the input of {down.y.name}")
            if not plain or split:
                linear.give("up", f"its output makes up the input of {down.y.name}")
        for linear in plain:
            linear.give("up", f"its output makes up the input of {down.y.name}")


# Routers and heads.


def _give_router_role(flow: Dataflow) -> None:
    """Give the role router to linears whose largest outputs choose which way their input takes."""
    for topk in flow.graph.nodes:
        if flow.ops[topk] != "topk":
            continue
        chosen = [n for n in topk.users if flow.ops[n] == "getitem" and n.args[1] == 1]
        reached = set(walk(chosen, lambda n: n.users - flow.joins.keys()))
        operands = {operand for n in reached for operand in n.all_input_nodes} - reached
        meets = {n for operand in operands for n in flow.behind(operand)}
        # Reshapes do not count here, because they could make tokens compete instead of outputs.
        for linear in flow.sources(topk.args[0], CASTS | ARITHMETIC | ACTIVATIONS | SOFTMAXES):
            if any(n in meets for n in flow.data.intersection(flow.behind(linear.x))):
                linear.give("router", f"{topk.name} chooses by its output where its input goes")


def _give_head_role(flow: Dataflow) -> None:
    """Give the role head to linears whose output the model returns, and from which at most a loss is computed."""
    body = FINE | {"router", "writer"}
    for linear in flow.linears:
        if body.isdisjoint(linear.reasons):
            ahead = flow.ahead(linear.y, CARRY | ACTIVATIONS | SOFTMAXES)
            used = (node in flow.by_y for node in walk([linear.y], lambda n: n.users) if node is not linear.y)
            if any(node.op == "output" for node in ahead) and not any(used):
                linear.give("head", "its output is an output of the model")
