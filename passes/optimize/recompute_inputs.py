"""Compute the input of an adapter again in the backward pass, from values that the base saves anyway."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ...compat.torch import OpOverload
from ...graph.insertion import is_inserted
from ...graph.layers import calls_in
from ...graph.parameter_work import parameter_work
from ...graph.queries import is_deterministic, is_narrow, is_product, operation_name, reads_tensor, value_of
from ...graph.subgraph import function_between
from ...graph.tensors import tensor_of
from ...graph.walk import ancestors
from ...graph.writes import may_return_a_view, overwrites
from ...ops.dropped_product import DroppedProduct
from ...ops.low_rank_products import LowRankProducts
from ...ops.saved_values import Recomputing
from ..pipeline import Declined, GraphPass, Outcome, Program

aten = torch.ops.aten

# What autograd saves of an operation that needs a gradient: its result, ...
_SAVES_RESULT = {
    aten.exp.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.scaled_dot_product_attention.default,
    aten.sigmoid.default,
    aten.softmax.int,
    aten.sqrt.default,
    aten.tanh.default,
}
# ... its first operands, ...
_SAVES_INPUTS = {
    aten.gelu.default: 1,
    aten.layer_norm.default: 1,
    aten.pow.Tensor_Scalar: 1,
    aten.rms_norm.default: 1,
    aten.scaled_dot_product_attention.default: 3,
    aten.silu.default: 1,
}
# ... or each of two operands, if the other one needs a gradient.
_SAVES_OTHER = {aten.bmm.default, aten.matmul.default, aten.mul.Tensor}

# Operations beside elementwise ones that cost a few passes over a tensor.
_NORMS = {aten.layer_norm.default, aten.mean.dim, aten.rms_norm.default}
_LONGEST = 12
"""The most operations that compute one input again."""

_NARROW = 64
"""Up to this rank a product with a square matrix costs next to nothing."""


@dataclass(frozen=True)
class RecomputeInputs(GraphPass):
    """Do not save `x` for the gradient of `A` in `x A^T` if it follows cheaply from values that the base saves anyway.

    The input of q, k, v and of gate and up is a norm of a value, that of down a gate times a value. The base saves the
    operands, because the gradients of norms and gates need them. A low-rank adapter then saves its narrow products
    alone. The pass stands after `GatherProducts`.

    An input that an adapter drops elements of is saved before that, as one tensor for q, k and v, or not at all; of the
    mask a bit is saved for each element (`DroppedProduct`), also where `A` is frozen.

    Safe because the same operations compute `x` again from the same tensors, to the same bits. All of them stand in the
    module that runs the adapter, because a hook on another module would act once and not the second time. Other random
    operations, and expensive ones, are not repeated. A graph that overwrites anything but its own buffers is left
    alone, because it might overwrite the saved values too.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training"})

    def run(self, gm: fx.GraphModule) -> Outcome:
        needing, once = _needing_gradients(gm), set(parameter_work(gm))
        saved = {node for user in needing - once for node in _saved_by(gm, user, needing)}
        overwritten = overwrites(gm)
        edits = 0
        declined = []
        for node in reversed([node for node in gm.graph.nodes if node not in once]):
            dropout = _dropout_before(node)
            if dropout is not None and not overwritten and node in needing:
                node = _gather_dropout(node, dropout)
                edits += 1
            alone = is_product(node)
            operation = LowRankProducts() if alone else node.target
            if not isinstance(operation, Recomputing) or operation.recipe:
                continue
            x, a, *others = node.args
            if a not in needing:
                continue
            sources = "the graph overwrites tensors" if overwritten else _sources(gm, node, saved | once)
            if isinstance(sources, str):
                if not is_narrow(x) and dropout is None:
                    declined.append(Declined.at(_results(node), sources))
                continue
            recipe = function_between(sources, [x])
            recomputing: Any = replace(operation, recipe=recipe, sources=len(sources))
            with gm.graph.inserting_before(node):
                args = (x, a, *sources, *others)
                call = gm.graph.create_node("call_function", recomputing, args, name=f"{node.name}_recomputing")
                result = gm.graph.call_function(operator.getitem, (call, 0)) if alone else call
            call.meta, result.meta = dict(node.meta), dict(node.meta)
            if alone:
                call.meta["val"] = (node.meta.get("val"),)
                call.meta.pop("tensor_meta", None)  # of the product itself
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
            edits += dropout is None
        return Outcome(edits, tuple(reversed(declined)))


def _dropout_before(node: fx.Node) -> fx.Node | None:
    """Return the dropout of an adapter whose result goes into the product `node` alone; None if there is none."""
    x = node.args[0] if is_product(node) and len(node.args) == 2 else None
    if not isinstance(x, fx.Node) or x.target is not aten.dropout.default or not is_inserted(x):
        return None
    return x if x.users.keys() == {node} else None


def _gather_dropout(product: fx.Node, dropout: fx.Node) -> fx.Node:
    """Let a product and the dropout before it be one operation, and return its node."""
    graph = product.graph
    x, probability, training = dropout.args
    assert isinstance(probability, float)
    with graph.inserting_before(product):
        args = (x, product.args[1], training)
        name = f"{product.name}_with_dropout"
        call = graph.create_node("call_function", DroppedProduct(probability), args, name=name)
    call.meta = dict(product.meta)
    product.replace_all_uses_with(call)
    graph.erase_node(product)
    graph.erase_node(dropout)
    return call


def _results(node: fx.Node) -> list[fx.Node]:
    """Return the results of gathered products `node`, which are of one site each; of another node the node itself."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] != 0] or [node]


def _needing_gradients(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values have a gradient because of the module's own parameters."""
    needing: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if reads_tensor(gm, node):
            if tensor_of(gm, str(node.target)).requires_grad:
                needing.add(node)
        elif node.target is not aten.detach.default and not needing.isdisjoint(node.all_input_nodes):
            needing.add(node)
    return needing


def _saved_by(gm: fx.GraphModule, user: fx.Node, needing: set[fx.Node]) -> list[fx.Node]:
    """Return what autograd saves for the gradient of `user`, which needs one; of an adapter, narrow products alone."""
    if is_inserted(user):
        t: Any = user.args[0] if is_product(user) and user.args[1] in needing else None
        return [t] if is_narrow(t) and not _is_between_narrow(gm, t) else []
    saved = [user] if user.target in _SAVES_RESULT else []
    if user.target in _SAVES_INPUTS:
        saved += user.all_input_nodes[: _SAVES_INPUTS[user.target]]
    if user.target in _SAVES_OTHER:
        left, right = user.args[:2]
        pairs = ((left, right), (right, left))
        saved += [node for node, factor in pairs if isinstance(node, fx.Node) and factor in needing]
    return saved


def _is_between_narrow(gm: fx.GraphModule, node: Any) -> bool:
    """Check whether `node` multiplies a narrow product by a small square matrix, as HRA does."""
    if not is_product(node) or not is_narrow(node.args[0]):
        return False
    matrix = node.args[1]
    value = value_of(gm, matrix) if isinstance(matrix, fx.Node) else None
    return value is not None and max(value.shape) <= _NARROW


def _sources(gm: fx.GraphModule, user: fx.Node, saved: set[fx.Node]) -> list[fx.Node] | str:
    """Return saved values, tensors of the module, and sizes, from which the input of `user` follows cheaply.

    Returns:
        Them, or why there are none.
    """
    x, call_of = user.args[0], calls_in(gm)
    if not isinstance(x, fx.Node) or x in saved:
        return "the input is saved anyway"

    def is_source(node: fx.Node) -> bool:
        return node in saved or reads_tensor(gm, node) or isinstance(node.meta.get("val"), (int, torch.SymInt))

    sources: list[fx.Node] = []
    repeated = 0
    for node in ancestors([x], stop=is_source):
        if is_source(node):
            sources.append(node)
            continue
        repeated += 1
        if not _is_cheap(node) and not _is_between_narrow(gm, node):
            return f"the input depends on {operation_name(node)}, which is neither saved nor repeated"
        if call_of(node) != call_of(user):
            return "the input comes from another module that is called, of which hooks may change it"
        if repeated > _LONGEST:
            return f"the input follows from saved values only in more than {_LONGEST} operations"
    return sources


def _is_cheap(node: fx.Node) -> bool:
    """Check whether `node` computes the same again in a few passes over a tensor, or in none."""
    if not isinstance(node.target, OpOverload) or not is_deterministic(node):
        return False
    return node.target in _NORMS or torch.Tag.pointwise in node.target.tags or may_return_a_view(node)
