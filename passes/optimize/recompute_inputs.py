"""Compute the input of an adapter again in the backward pass, where the base keeps what it follows from."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ...graph.parameter_work import parameter_work
from ...graph.provenance import is_inserted
from ...graph.queries import is_product, reads_tensor, value_of
from ...graph.subgraph import extract, forward_of
from ...graph.tensors import tensor_of
from ...graph.writes import overwrites
from ...ops.low_rank_products import LowRankProducts
from ..pipeline import GraphPass, Program

aten = torch.ops.aten

# What autograd keeps of an operation: its result, ...
_KEEPS_RESULT = {
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
_KEEPS_INPUTS = {
    aten.gelu.default: 1,
    aten.layer_norm.default: 1,
    aten.pow.Tensor_Scalar: 1,
    aten.rms_norm.default: 1,
    aten.scaled_dot_product_attention.default: 3,
    aten.silu.default: 1,
}
# ... or of two operands each, if the other one needs a gradient.
_KEEPS_OTHER = {aten.bmm.default, aten.matmul.default, aten.mul.Tensor}

# A few passes over a tensor, or a view.
_CHEAP = {
    aten.gelu.default,
    aten.layer_norm.default,
    aten.pow.Tensor_Scalar,
    aten.rms_norm.default,
    aten.silu.default,
    aten.add.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.div.Tensor,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.neg.default,
    aten.permute.default,
    aten.relu.default,
    aten.reshape.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.slice.Tensor,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten.transpose.int,
    aten.type_as.default,
    aten.unsqueeze.default,
    aten.view.default,
}
_LONGEST = 12
"""Operations of a recipe."""

_NARROW = 64
"""The largest rank at which a product with a square matrix is as good as none."""


@dataclass(frozen=True)
class RecomputeInputs(GraphPass):
    """Do not keep `x` for the gradient of `A` in `x A^T` where it follows cheaply from what the base keeps anyway.

    The input of q, k, v and of gate and up is a norm of something, that of down a gate times something: the base keeps
    the operands, as the gradient of a norm and of a gate needs them. A low-rank adapter then keeps its narrow products
    alone. To be run after `GatherProducts`. Safe because `x` is computed again by the same operations from the same
    tensors, to the same bits; random and expensive ones are not repeated, and graphs that overwrite anything but their
    own buffers are left alone.
    """

    programs: ClassVar[frozenset[Program]] = frozenset({"training"})

    def run(self, gm: fx.GraphModule) -> int:
        if overwrites(gm):
            return 0  # what is kept might be overwritten by then
        needing, once = _needing_gradients(gm), set(parameter_work(gm))
        kept = {node for user in needing - once for node in _kept_by(gm, user, needing)}
        edits = 0
        for node in reversed([node for node in gm.graph.nodes if node not in once]):
            alone = is_product(node)
            products = LowRankProducts() if alone else node.target
            if not isinstance(products, LowRankProducts) or products.recipe or node.args[1] not in needing:
                continue
            x, a, *sites = node.args
            if (sources := _sources(gm, x, kept | once)) is None:
                continue
            recipe = forward_of(nn.Module(), extract(sources, [x]))
            with gm.graph.inserting_before(node):
                call = gm.graph.call_function(
                    replace(products, recipe=recipe, sources=len(sources)), (x, a, *sources, *sites)
                )
                result = gm.graph.call_function(operator.getitem, (call, 0)) if alone else call
            call.meta, result.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
            edits += 1
        return edits


def _needing_gradients(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values have a gradient because of the module's own parameters."""
    needing: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if reads_tensor(gm, node):
            if tensor_of(gm, str(node.target)).requires_grad:
                needing.add(node)
        elif node.target is not aten.detach.default and not needing.isdisjoint(node.all_input_nodes):
            needing.add(node)
    return needing


def _kept_by(gm: fx.GraphModule, user: fx.Node, needing: set[fx.Node]) -> list[fx.Node]:
    """What autograd keeps for the gradient of `user`, which needs one; by adapters, narrow products alone."""
    if is_inserted(user):
        t: Any = user.args[0] if is_product(user) and user.args[1] in needing else None
        return [t] if _is_narrow(t) and not _is_between_narrow(gm, t) else []
    kept = [user] if user.target in _KEEPS_RESULT else []
    if user.target in _KEEPS_INPUTS:
        kept += user.all_input_nodes[: _KEEPS_INPUTS[user.target]]
    if user.target in _KEEPS_OTHER:
        one, other = user.args[:2]
        kept += [
            node for node, factor in ((one, other), (other, one)) if isinstance(node, fx.Node) and factor in needing
        ]
    return kept


def _is_between_narrow(gm: fx.GraphModule, node: Any) -> bool:
    """Whether `node` multiplies a narrow product by a small square matrix, as HRA does between its reflections."""
    if not is_product(node) or not _is_narrow(node.args[0]):
        return False
    matrix = node.args[1]
    value = value_of(gm, matrix) if isinstance(matrix, fx.Node) else None
    return value is not None and max(value.shape) <= _NARROW


def _is_narrow(node: Any) -> bool:
    """Whether `node` is a product with an adapter's matrix, or a part of one."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        parts: Any = node.args[0]
        return parts.target is aten.split_with_sizes.default and is_product(parts.args[0])
    return is_product(node)


def _sources(gm: fx.GraphModule, x: Any, kept: set[fx.Node]) -> list[fx.Node] | None:
    """Nodes that are kept, tensors of the module, and sizes, from which `x` follows cheaply; None if it does not.

    None too if there is no need because `x` is kept itself.
    """
    if not isinstance(x, fx.Node) or x in kept:
        return None
    sources: dict[fx.Node, None] = {}
    passed: dict[fx.Node, None] = {}
    pending = [x]
    while pending:
        node = pending.pop()
        if node in kept or reads_tensor(gm, node) or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            sources[node] = None
        elif (node.target in _CHEAP or _is_between_narrow(gm, node)) and len(passed) < _LONGEST:
            passed[node] = None
            pending.extend(operand for operand in node.all_input_nodes if operand not in passed)
        else:
            return None
    return list(sources)
