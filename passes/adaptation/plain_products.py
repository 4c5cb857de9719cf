"""Bring the products of a traced `forward` into one form, however they are written.

A low-rank branch may be `s * F.linear(F.linear(x, A), B)`, `(x @ A.T) @ B.T * s`, `einsum("...d,rd->...r", x, A)`, and
much else. The passes that optimize branches know one form: `base(x) + linear(linear(x, A), B) * s`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.tensors import HALF
from ...sites.kinds.contraction import Contraction, contraction

aten = torch.ops.aten
_LINEAR = aten.linear.default


def normalize_products(graph: fx.Graph, x: fx.Node, base: fx.Node, frozen: set[fx.Node]) -> None:
    """Write every product of data with a matrix as `linear(x, M)`, with its scale and the frozen output in one place.

    - `matmul`, `mm`, `inner` and `einsum` become `linear`. The matrix is transposed if it must be, and no transposition
      of a transposition is left. To the same bits.
    - A cast that does nothing goes, if a product, a further cast or the output reads it. To the same bits: under
      autocast a product casts its operands anyway, and the output gets the type of the frozen one.
    - `linear(s z, M)` becomes `s linear(z, M)`, and `s t z` and `z / s` become one factor. So the scale comes last, and
      other adapters can share the input. Rounded elsewhere, so not in half precision, where it could overflow.
    - `d + base(x)` becomes `base(x) + d`. To the same bits.

    Args:
        graph: of the fragment, whose nodes know their values.
        x: the input of the site.
        base: the node that stands for the call of the frozen linear.
        frozen: the nodes for tensors that are not data: the frozen ones and the adapter's.
    """
    matrices = _depending_on_these_alone(graph, frozen)
    for node in list(graph.nodes):
        if node.op == "call_function" and node is not base and node not in matrices:
            if (product := _as_linear(node, matrices)) is not None:
                z, matrix = product
                node = _replaced(node, _LINEAR, (z, _matrix(node, *matrix)))
            node = _with_scale_outside(node)
            _put_first(node, (x, base))
        casts = _dropped_before(node, base)
        for value in node.all_input_nodes:
            if value.target in casts and _value(value).dtype == _value(value.all_input_nodes[0]).dtype:
                node.replace_input_with(value, value.all_input_nodes[0])


def _depending_on_these_alone(graph: fx.Graph, frozen: set[fx.Node]) -> set[fx.Node]:
    known = set(frozen)
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            known.add(node)
    return known


def _replaced(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """Put the call of another operation in the place of `node`, with the name of that operation."""
    with node.graph.inserting_before(node):
        call = _call(node.graph, target, args, node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    return call


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> fx.Node:
    """Insert the call of an operation, with the name that a trace gives it."""
    call = graph.create_node("call_function", target, args, name=target.__name__.partition(".")[0])
    call.meta = dict(meta)
    return call


def _drop_unread(node: fx.Node) -> None:
    """Erase `node` and what only it reads, if nothing reads it: passes count readers."""
    while node.op == "call_function" and not node.users:
        read = node.all_input_nodes[0]
        node.graph.erase_node(node)
        node = read


def _put_first(node: fx.Node, terms: tuple[fx.Node, ...]) -> None:
    """Exchange the terms of a sum if the second is one of `terms` and the first is another value."""
    if node.target is aten.add.Tensor and not node.kwargs:
        first, second = node.args
        if isinstance(first, fx.Node) and first not in terms and second in terms:
            node.args = (second, first)


# Products.


def _as_linear(node: fx.Node, matrices: set[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, bool]] | None:
    """Return the data and the matrix that `node` multiplies, and whether the matrix is to be transposed; or None."""
    operands = node.args[1] if node.target is aten.einsum.default else node.args
    if not isinstance(operands, (tuple, list)) or len(operands) != 2 or node.kwargs:
        return None
    first, second = operands
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or (first in matrices) == (second in matrices):
        return None
    if node.target is aten.einsum.default:
        z, matrix = (second, first) if first in matrices else (first, second)
        kind = contraction(str(node.args[0]), first in matrices, tuple(_value(matrix).shape))
        plain = isinstance(kind, Contraction) and len(kind.inputs) == len(kind.outputs) == 1
        return (z, (matrix, kind.order == (1, 0))) if plain and isinstance(kind, Contraction) else None
    if second not in matrices or _value(second).dim() != 2:
        return None
    if node.target in (aten.matmul.default, aten.mm.default):
        return first, (second, True)
    return (first, (second, False)) if node.target is aten.inner.default else None


def _matrix(reader: fx.Node, matrix: fx.Node, transposed: bool) -> fx.Node:
    """Return the node of `matrix`, perhaps transposed, for `reader`, without a transposition of a transposition."""
    while _is_transposition(matrix):
        matrix, transposed = matrix.all_input_nodes[0], not transposed
    if not transposed:
        return matrix
    with reader.graph.inserting_before(reader):
        return _call(reader.graph, aten.t.default, (matrix,), {"val": _value(matrix).t()})


def _is_transposition(node: fx.Node) -> bool:
    """Check whether `node` transposes a real matrix."""
    if node.op != "call_function" or _value(node).dim() != 2 or _value(node).is_complex():
        return False
    args: Any = node.args
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        return bool((args[1] - args[2]) % 2)
    if node.target is aten.permute.default:
        return [dim % 2 for dim in args[1]] == [1, 0]
    return node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default)


# Scales.


def _with_scale_outside(node: fx.Node) -> fx.Node:
    """Make one factor of the scale of a product and that of its input, which scales the result; return the result."""
    product, factor = _split(node)
    if product is None or _value(product).dtype in HALF:
        return node
    moved = 1.0
    while (scaled := _scaled_input(product)) is not None:
        z, inner = scaled
        moved *= inner
        read = product.all_input_nodes[0]
        product.replace_input_with(read, z)
        _drop_unread(read)
    if product is not node:
        read = node.all_input_nodes[0]
        result = _replaced(node, aten.mul.Tensor, (product, factor * moved))
        _drop_unread(read)
        return result
    if moved == 1:
        return node
    with node.graph.inserting_after(node):
        result = _call(node.graph, aten.mul.Tensor, (node, moved), node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    return result


def _split(node: fx.Node) -> tuple[fx.Node | None, float]:
    """Return the product that `node` is, or that it scales by numbers alone, and the scale; or None."""
    scale = 1.0
    while (scaled := _scaled(node)) is not None and len(scaled[0].users) == 1:
        node, factor = scaled
        scale *= factor
    return (node, scale) if node.target is _LINEAR and len(node.args) == 2 else (None, scale)


def _scaled_input(product: fx.Node) -> tuple[fx.Node, float] | None:
    """Return the input of `product` without the number that scales it, and the number; None if nothing scales it."""
    z = product.args[0]
    return _scaled(z) if isinstance(z, fx.Node) and len(z.users) == 1 else None


def _scaled(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return the value that `node` scales by a number, and the number; None if it does not scale."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    z, number = node.args
    if not isinstance(z, fx.Node) or not isinstance(number, (int, float)) or isinstance(number, bool):
        return None
    if node.target is aten.mul.Tensor:
        return z, float(number)
    return (z, 1 / number) if number and math.isfinite(1 / number) else None


# Casts.


def _dropped_before(node: fx.Node, base: fx.Node) -> tuple[Any, ...]:
    """Return the casts that make no difference to `node` if they do nothing now, whatever autocast makes of types."""
    if node is base or node.target is _LINEAR:
        return aten.to.dtype, aten.type_as.default
    return (aten.to.dtype,) if node.op == "output" or node.target in (aten.to.dtype, aten.type_as.default) else ()


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
