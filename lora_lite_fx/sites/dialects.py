"""Match the ways in which a graph may write a product with a frozen weight."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..compat.torch import TO_COPY, UNSAFE_VIEW, OpOverload, schema_of
from ..graph.provenance import is_inserted, replaced_tensor
from ..graph.queries import value_of
from ..graph.tensors import is_quantized, tensor_of
from .computed import Computation, name_and_shape
from .dataflow import op_name
from .kinds.contraction import contraction
from .kinds.convolution import Convolution, GroupedConvolution
from .kinds.embedding import Lookup
from .kinds.experts import Experts
from .kinds.linear import SiteKind
from .kinds.norm import Norm
from .norms import match_norm
from .site import Call

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Match:
    """One product with a frozen weight.

    Args:
        call: the nodes.
        weight: the weight.
        kind: the kind of site.
        bias: the bias, or None.
    """

    call: Call
    source: _Source
    kind: SiteKind
    bias: _Source | None

    @property
    def weight(self) -> str:
        """The qualified name of the weight parameter."""
        return self.source.name


def match_site(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node] = ()) -> Match | None:
    """Return the match of `node` as a product with a frozen weight of real numbers, or None if it is not one.

    Args:
        gm: the graph module.
        node: any of its nodes.
        frozen: the values that may be weights and biases without being parameters, see `frozen_values`.
    """
    match = _match_product(gm, node, frozen)
    return None if match is None or is_complex(gm, node, match.weight, match.source.computed) else match


def is_complex(gm: fx.GraphModule, product: fx.Node, weight: str, computed: fx.Node | None) -> bool:
    """Return whether a product is one of complex numbers, for which adapters are not made.

    Args:
        gm: the graph module.
        product: the node.
        weight: the name of the parameter that it multiplies with, the largest if it multiplies with a computed tensor.
        computed: that tensor, or None.
    """
    value = product.meta.get("val")
    if "val" not in product.meta and computed is not None:  # symbolic tracing does not tell
        value = Computation.of(computed).run(gm)
    return tensor_of(gm, weight).is_complex() or (isinstance(value, Tensor) and value.is_complex())


def _match_product(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node]) -> Match | None:
    if node.op != "call_function" or is_inserted(node):
        return None
    args: tuple[Any, ...] = node.args
    if node.target in _PRODUCTS and not node.kwargs and _tensor(gm, args[1], 2, node, frozen) is not None:
        x, weight = args
        call, bias = _with_bias_addition(gm, _between_reshapes(gm, x, node))
        out_in = False
    elif node.target in _OTHER_KINDS or op_name(node) in _GROUPED:
        return _match_other_kind(gm, node, frozen)
    elif node.target is aten.linear.default:
        x, weight, bias = (*args, None)[:3]
        call = Call(x, node, node)
        out_in = True
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = args
        call = _between_reshapes(gm, x, node)
        out_in = False
    elif node.target is aten.einsum.default:
        return _match_einsum(gm, node, frozen)
    else:
        return _match_norm(gm, node, frozen)
    source = _tensor(gm, weight, 2, node, frozen)
    bias_source = _tensor(gm, bias, 1, node, frozen) if bias is not None else None
    if source is None or (bias is not None and bias_source is None):
        return None
    kind = SiteKind(out_in == source.flipped, source.rows)
    return _match(call, source, kind, bias_source)


def _match(call: Call, source: _Source, kind: SiteKind, bias: _Source | None) -> Match:
    """Return the match, with the nodes of a computed weight or bias noted at its call."""
    bias_node = bias.computed if bias is not None else None
    if source.computed is not None or bias_node is not None:
        call = replace(call, computed_weight=source.computed, computed_bias=bias_node)
    return Match(call, source, kind, bias)


def _match_einsum(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node]) -> Match | None:
    """Return the match of an `einsum` that is a linear over the last dimensions, or None."""
    equation, operands, *_ = cast(tuple[str, list[fx.Node]], node.args)
    if len(operands) != 2:
        return None
    for weight, x in (operands, operands[::-1]):
        source = next((s for dim in (2, 3, 4) if (s := _tensor(gm, weight, dim, node, frozen, exact=True))), None)
        if source is not None:
            kind = contraction(equation, weight is operands[0], tuple(source.shape))
            return None if isinstance(kind, str) else _match(Call(x, node, node), source, kind, None)
    return None


def _match_norm(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node]) -> Match | None:
    """Return the match of the weight of a norm, or None."""
    if (norm := match_norm(gm, node, frozen)) is None:
        return None
    weight, bias = (
        None if name is None else _Source(name, False, None, gm.get_parameter(name).shape)
        for name in (norm.weight, norm.bias)
    )
    return None if weight is None else Match(Call(norm.x, node, node), weight, Norm(), bias)


_CONVOLUTIONS = {
    operator: dims
    for dims, packet in enumerate((aten.conv1d, aten.conv2d, aten.conv3d), 1)
    for operator in (packet.default, packet.padding)
}
"""The number of dimensions that a kernel has, by operator."""
_DECOMPOSED = aten.convolution.default
_PRODUCTS = (aten.matmul.default, aten.mm.default, operator.matmul, aten.bmm.default)
_OTHER_KINDS = (aten.embedding.default, *_CONVOLUTIONS, _DECOMPOSED, *_PRODUCTS)
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def _match_other_kind(gm: fx.GraphModule, node: fx.Node, frozen: Container[fx.Node]) -> Match | None:
    """Return the match of `node` as an embedding, a convolution or experts, or None."""
    args = _arguments(node)
    kind: SiteKind
    if node.target is aten.embedding.default:
        if (source := _parameter(gm, args["weight"], dim=2)) is None or source.flipped or source.rows:
            return None
        if is_quantized(gm.get_parameter(source.name)):
            return None
        kind = Lookup(padding=args["padding_idx"])
        return Match(Call(args["indices"], node, node), source, kind, None)
    if node.target in (*_CONVOLUTIONS, _DECOMPOSED):
        weight, bias = args["weight"], args["bias"]
        dims = _CONVOLUTIONS.get(node.target) or len(args["stride"])
        source = _tensor(gm, weight, 2 + dims, node, frozen)
        bias_source = _tensor(gm, bias, 1, node, frozen) if bias is not None else None
        transposed = args.get("transposed") or dims not in (1, 2, 3)
        if source is None or (bias is not None and bias_source is None) or transposed:
            return None
        steps = {key: _for_each_dimension(args[key], dims) for key in ("stride", "padding", "dilation")}
        kernel, groups = tuple(source.shape[2:]), args["groups"]
        kind = Convolution(kernel=kernel, groups=groups, **steps)
        if groups > 1:
            kind = GroupedConvolution(kernel=kernel, groups=groups, outputs=source.shape[0], **steps)
        return _match(Call(args["input"], node, node), source, kind, bias_source)
    x, weight, *routing = (operand for operand in (*node.args, *node.kwargs.values()) if operand is not None)
    source = _parameter(gm, weight, dim=3)
    known = isinstance(x, fx.Node) and all("val" in getattr(operand, "meta", ()) for operand in routing)
    if source is None or source.rows or not known or len(routing) != (op_name(node) in _GROUPED):
        return None
    kind = Experts(transposed=not source.flipped, operator=node.target)
    call = _between_reshapes(gm, x, node, all_dimensions=True)  # type: ignore[arg-type]
    return Match(replace(call, routing=tuple(routing)), source, kind, None)  # type: ignore[arg-type]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by name, with its defaults."""
    named = dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for position, argument in enumerate(schema_of(node.target).arguments):
            value = node.args[position] if position < len(node.args) else argument.default_value
            named.setdefault(argument.name, value)
    return named


def _for_each_dimension(value: Any, dims: int) -> Any:
    """Return a setting of a convolution as one value for each dimension; "same" and "valid" stay."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _between_reshapes(gm: fx.GraphModule, x: fx.Node, product: fx.Node, all_dimensions: bool = False) -> Call:
    """Return the call from before the reshapes of the input to after those of the product.

    GPT-2 writes `view(x, [-1, d_in])`, product, `view(_, [..., d_out])`, and decompositions of linears do so too. The
    call is the product alone if the reshapes do not cancel each other out.

    Args:
        all_dimensions: whether reshapes must leave all dimensions as they are; else the last one.
    """

    def reshapes(start: fx.Node, following: Callable[[fx.Node], fx.Node | None]) -> list[fx.Node]:
        """Return `start` and the values that it is reshaped from, or to, while it keeps its last dimension."""
        nodes = [start]
        while (node := following(nodes[-1])) is not None:
            was, now = _shape(gm, nodes[-1]), _shape(gm, node)
            if was is None or now is None or was[-1:] != now[-1:] or (all_dimensions and was != now):
                break
            nodes.append(node)
        return nodes

    def before(node: fx.Node) -> fx.Node | None:
        return node.all_input_nodes[0] if _is_reshape(gm, node) and len(node.users) == 1 else None

    def after(node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and _is_reshape(gm, users[0]) else None

    inputs, outputs = reshapes(x, before), reshapes(product, after)
    pairs = ((start, end) for start in reversed(inputs) for end in reversed(outputs) if _matches(gm, start, end))
    start, end = next(pairs, (x, product))
    return Call(start, end, product)


def _matches(gm: fx.GraphModule, x: fx.Node, y: fx.Node) -> bool:
    """Check whether `x` and `y` have the same dimensions but for the last."""
    x_shape, y_shape = _shape(gm, x), _shape(gm, y)
    return x_shape is not None and y_shape is not None and x_shape[:-1] == y_shape[:-1]


def _shape(gm: fx.GraphModule, node: fx.Node) -> tuple[str, ...] | None:
    """Return the sizes of the value of `node` as text, because comparing symbols would add guards; None if unknown."""
    value = value_of(gm, node)
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None


def _is_reshape(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Check whether `node` gives all elements of its operand another shape, in the same order."""
    if node.op != "call_function":
        return False
    if node.target in (aten.expand.default, aten.clone.default):
        return _shape(gm, node) == _shape(gm, node.all_input_nodes[0])
    return node.target in (aten.view.default, aten.reshape.default, UNSAFE_VIEW)


def _with_bias_addition(gm: fx.GraphModule, call: Call) -> tuple[Call, fx.Node | None]:
    """Return the call of `x @ W`, with the addition of a bias vector if nothing else reads the product."""
    users = list(call.y.users)
    if len(users) == 1 and users[0].target in (aten.add.Tensor, operator.add):
        others = [a for a in users[0].args if a is not call.y]
        if len(others) == 1 and isinstance(others[0], fx.Node) and _parameter(gm, others[0], dim=1):
            return replace(call, y=users[0]), others[0]
    return call, None


_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default)
_COPIES = (
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, TO_COPY),
    *(aten.detach.default, aten.alias.default, aten.clone.default),
)
_BROADCASTS = (aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default)


@dataclass(frozen=True)
class _Source:
    """A frozen tensor that a product reads.

    Args:
        name: qualified name of the parameter; of the largest one, if the tensor is computed.
        flipped: whether the tensor is transposed on the way.
        rows: the rows that are taken of it, as the first and the one after the last; None means all.
        shape: the sizes of the tensor.
        computed: the node that is the tensor, if it is computed.
    """

    name: str
    flipped: bool
    rows: tuple[int, int] | None
    shape: Sequence[int]
    computed: fx.Node | None = None

    @property
    def identity(self) -> tuple[str, str]:
        """What tells the tensor from others: two of equal identity have the same values."""
        return self.name, "" if self.computed is None else Computation.of(self.computed).text


def _tensor(
    gm: fx.GraphModule, node: object, dim: int, product: fx.Node, frozen: Container[fx.Node], exact: bool = False
) -> _Source | None:
    """Return the frozen tensor of `dim` dimensions that `product` reads as `node`: a parameter, or computed from some.

    Args:
        gm: the graph module.
        node: the operand.
        dim: the number of dimensions.
        product: the node that reads it.
        frozen: the values that may be such tensors.
        exact: whether nothing may stand between the tensor and the product but casts. So it is for a weight of more
            than two dimensions.
    """
    source = _parameter(gm, node, dim)
    if source is not None and not ((exact or dim > 2) and (source.flipped or source.rows)):
        return source
    flipped = False
    while isinstance(node, fx.Node) and not exact and node.op == "call_function" and dim == 2:
        if (replaced := replaced_tensor(node)) is not None:
            node = replaced
            continue
        swaps = _swaps_last_two(node, dim) if node.target in _TRANSPOSES else None
        if swaps is None and node.target not in _COPIES:
            break
        flipped ^= bool(swaps)
        node = node.all_input_nodes[0]
    node = (replaced_tensor(node) or node) if isinstance(node, fx.Node) else node
    if not isinstance(node, fx.Node) or node not in frozen:
        return None
    named = name_and_shape(gm, node, dim, product)
    return None if named is None else _Source(named[0], flipped, None, named[1], node)


def _parameter(gm: fx.GraphModule, node: object, dim: int) -> _Source | None:
    """Return the parameter of `dim` dimensions that `node` reads, through casts, transposes and splits by rows.

    A matrix may be repeated along further dimensions, as decompositions do for a batched product.
    """
    flipped, rows = False, None
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.op != "call_function":
            return None
        if (replaced := replaced_tensor(node)) is not None:
            node = replaced
            continue
        if node.target in _TRANSPOSES:
            swaps = _swaps_last_two(node, dim)
            if swaps is None or (swaps and rows is not None):  # columns that a split takes
                return None
            flipped ^= swaps
        elif node.target in _BROADCASTS:
            if not _repeats(gm, node, dim):
                return None
        elif node.target not in _COPIES:
            rows = _rows(node) if rows is None else None
            if rows is None:
                return None
            node = node if _is_slice(node) else node.all_input_nodes[0]
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or is_inserted(node):
        return None
    try:
        tensor = gm.get_parameter(str(node.target))
    except AttributeError:
        return None
    return _Source(str(node.target), flipped, rows, tensor.shape) if tensor.dim() == dim else None


def _swaps_last_two(node: fx.Node, dim: int) -> bool | None:
    """Return whether a transpose of a matrix, or of `dim` dimensions, swaps the last two; None if it moves others."""
    if node.target is aten.mT.default:
        return True
    value = node.meta.get("val")
    rank = value.dim() if isinstance(value, Tensor) else dim
    args = _arguments(node)
    if node.target is aten.transpose.int:
        named = [args["dim0"], args["dim1"]]
    else:
        named = list(args["dims"]) if node.target is aten.permute.default else []
    if not all(isinstance(d, int) and -rank <= d < rank for d in named):
        return None  # without shapes, this shows that it is another tensor
    dims = list(range(rank))
    moved = list(dims)
    if node.target is aten.transpose.int:
        moved[named[0]], moved[named[1]] = dims[named[1]], dims[named[0]]
    elif node.target is aten.permute.default:
        moved = [dims[d] for d in named]
    else:
        moved.reverse()
    return {tuple(dims): False, (*dims[:-2], *reversed(dims[-2:])): True}.get(tuple(moved))


def _repeats(gm: fx.GraphModule, node: fx.Node, dim: int) -> bool:
    """Check whether `node` repeats a matrix along dimensions before it; other parameters must stay as they are."""
    was, now = _shape(gm, node.all_input_nodes[0]), _shape(gm, node)
    if was is None or now is None:
        return False
    return was[-2:] == now[-2:] and len(was) >= 2 if dim == 2 else was == now


def _is_slice(node: fx.Node) -> bool:
    """Return whether `node` takes rows by their numbers, as `weight[8:16]` in a symbolic trace."""
    index: Any = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, slice) and index.step is None and type(index.start) is type(index.stop) is int


def _rows(node: fx.Node) -> tuple[int, int] | None:
    """Return the rows of a tensor that `node` takes from it or its split, as in `nn.MultiheadAttention`, or None."""
    if _is_slice(node):
        _, rows = cast(tuple[fx.Node, slice], node.args)
        return rows.start, rows.stop
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or op_name(split) not in ("chunk", "split", "split_with_sizes"):
        return None
    parts, index = split.meta.get("val"), node.args[1]
    if not isinstance(index, int) or parts is None or _arguments(split).get("dim", 0) != 0:
        return None
    start = sum(part.shape[0] for part in parts[:index])
    return start, start + parts[index].shape[0]
