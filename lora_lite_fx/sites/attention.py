"""Find attention in the dataflow, and the linears that make its queries, keys and values or read its result.

Attention is a product of probabilities with values. It is fused (`scaled_dot_product_attention`) or spelled out around
a softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from ..graph.walk import ancestors
from .dataflow import CARRY, PRODUCTS, TRANSPOSES, Dataflow, LinearNode, op_name

# The operator, our own function for `nn.MultiheadAttention`, and what decompositions make of the operator.
_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FUSED = ("scaled_dot_product_attention", "attend_heads", *(f"_scaled_dot_product_{name}" for name in _KERNELS))
_ARGUMENTS = ("query", "key", "value")


def give_attention_roles(flow: Dataflow) -> None:
    """Give the roles query, key, value and output."""
    for node in flow.graph.nodes:
        if flow.ops[node] in _FUSED:
            arguments = dict(zip(_ARGUMENTS, node.args[:3], strict=False))
            arguments |= {k: v for k, v in node.kwargs.items() if k in _ARGUMENTS}
            _give(flow, arguments, node)
        elif flow.ops[node] in ("softmax", "_softmax"):
            for arguments, result in _around_softmax(flow, node):
                _give(flow, arguments, result)


def _give(flow: Dataflow, arguments: Mapping[str, Any], result: fx.Node) -> None:
    """Give the roles of one attention, from its `arguments` by role and its `result`."""
    projections = {role: flow.sources(argument) for role, argument in arguments.items()}
    for role, linears in projections.items():
        for linear in linears:
            linear.give(role, f"its output is the {role} of {result.name}")
    for linear in flow.readers(result):
        linear.give("output", f"it reads the result of {result.name}")
    _give_low_rank(flow, projections, result)


def _give_low_rank(flow: Dataflow, projections: Mapping[str, list[LinearNode]], result: fx.Node) -> None:
    """Give the role of a projection that is a product of two linears to the first of the two as well.

    Two conditions keep other linears in front of the attention out. The first factor shares its input with another
    projection of the attention, or with the first factor of one. And it makes only a part of the queries, keys and
    values: nothing else reads it, and it is not added to the residual stream.
    """
    direct = {id(linear) for linears in projections.values() for linear in linears}
    firsts: list[tuple[LinearNode, set[str]]] = []
    for linears in projections.values():
        for second in linears:
            for first in flow.sources(second.x) if second.x not in flow.skips else ():
                readers = {id(reader) for reader in flow.readers(first.y)}
                joins = any(node in flow.joins or node in flow.skips for node in flow.ahead(first.y))
                if readers <= direct and not joins:
                    roles = {
                        role for role, made in projections.items() if any(id(linear) in readers for linear in made)
                    }
                    firsts.append((first, roles))
    inputs = [linear for linears in projections.values() for linear in linears] + [first for first, _ in firsts]
    for first, roles in firsts:
        shared = any(other.x is first.x and other is not first for other in inputs)
        for role in sorted(roles) if shared and len(roles) < len(_ARGUMENTS) else ():
            first.give(role, f"its output is projected to the {role} of {result.name}")


# Attention that is spelled out.


def _around_softmax(flow: Dataflow, softmax: fx.Node) -> Iterator[tuple[dict[str, Any], fx.Node]]:
    """Yield the arguments and the result product of each attention whose probabilities are `softmax`."""
    # Scores may be scaled, masked, biased and soft-capped (a tanh) on their way to the softmax.
    behind = ancestors(softmax.all_input_nodes[:1], lambda n: flow.ops[n] not in CARRY | {"tanh"})
    products = [n for n in behind if _is_product(flow, n)]
    for result in flow.ahead(softmax):
        if not _is_product(flow, result):
            continue
        first, second = _factors(result)
        probable = [_carries(flow, softmax, factor) for factor in (first, second)]
        if probable.count(True) != 1:
            continue
        value = second if probable[0] else first
        # Of several score products, those of two projections count, and not those with a parameter or a constant.
        content = [p for p in products if len(products) == 1 or all(flow.sources(factor) for factor in _factors(p))]
        scores = [_query_and_key(p, softmax, _is_transposed(flow, p, softmax)) for p in content]
        if len(scores) > 1:
            # Relative positions have a projection of their own. The keys are projected from the input of the values.
            inputs = {linear.x for linear in flow.sources(value)}
            scores = [pair for pair in scores if not inputs.isdisjoint(linear.x for linear in flow.sources(pair[1]))]
        if len(scores) == 1:
            yield {"query": scores[0][0], "key": scores[0][1], "value": value}, result


def _is_transposed(flow: Dataflow, scores: fx.Node, softmax: fx.Node) -> bool:
    """Return whether the scores are transposed on their way to the softmax."""
    through = CARRY | {"tanh"}
    flipped, node = False, softmax
    while node is not scores:
        flipped ^= flow.ops[node] in TRANSPOSES
        node = next(n for n in node.all_input_nodes if scores in ancestors([n], lambda m: flow.ops[m] not in through))
    return flipped


def _carries(flow: Dataflow, source: fx.Node, node: Any) -> bool:
    """Return whether `node` carries `source` forward."""
    return source in ancestors([node], lambda n: flow.ops[n] not in CARRY)


def _is_product(flow: Dataflow, node: fx.Node) -> bool:
    """Return whether `node` is a product of two tensors and not a linear. An `einsum` may have one or three."""
    return flow.ops[node] in PRODUCTS and node not in flow.by_y and len(_factors(node)) == 2


def _factors(product: fx.Node) -> list[Any]:
    """Return the factors of a matrix product. The first argument of `baddbmm` and `einsum` is not a factor."""
    if op_name(product) == "matmul" or op_name(product) == "bmm":
        return list(product.args[:2])
    factors = [n for a in product.args[1:] for n in (a if isinstance(a, (list, tuple)) else [a])]
    return factors if op_name(product) == "einsum" else factors[:2]


def _query_and_key(scores: fx.Node, softmax: fx.Node, transposed: bool) -> tuple[Any, Any]:
    """Return the factors of a score product, query and key. The softmax normalizes the axis of the key."""
    first, second = _factors(scores)
    dim: Any = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim", -1)
    if "val" in softmax.meta and isinstance(dim, int):
        dim = dim % softmax.meta["val"].dim() - softmax.meta["val"].dim()
    if transposed and dim in (-1, -2):
        dim = -3 - dim
    key_first: bool = dim == -2
    if op_name(scores) == "einsum":
        # An equation of lists, without "->", or with a dimension counted from the front past an ellipsis is a doubt.
        equation = scores.args[0] if isinstance(scores.args[0], str) else ""
        inputs, _, output = equation.replace(" ", "").partition("->")
        left, _, right = inputs.partition(",")
        counted = isinstance(dim, int) and -len(output) <= dim < (0 if "." in output else len(output))
        if not counted or (output[dim] in left) == (output[dim] in right):
            return None, None
        key_first = output[dim] in left
    return (second, first) if key_first else (first, second)
