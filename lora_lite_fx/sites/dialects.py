"""Match the ways in which a graph may write a product with a frozen weight."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.direct_calls import OpOverload
from ..graph.provenance import is_inserted
from .dataflow import op_name
from .kinds.convolution import Convolution
from .kinds.embedding import Lookup
from .kinds.experts import Experts
from .kinds.linear import SiteKind
from .site import Call

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Match:
    """One product with a frozen weight.

    Args:
        call: the nodes.
        weight: qualified name of the weight parameter.
        kind: the kind of site.
        bias: the bias parameter, or None.
    """

    call: Call
    weight: str
    kind: SiteKind
    bias: _Source | None


def match_site(gm: fx.GraphModule, node: fx.Node) -> Match | None:
    """Return the match of `node` as a product with a frozen parameter, or None if it is not one."""
    if node.op != "call_function" or is_inserted(node):
        return None
    if node.target in _OTHER_KINDS or op_name(node) in _GROUPED:
        return _match_other_kind(gm, node)
    args: tuple[Any, ...] = node.args
    if node.target is aten.linear.default:
        x, weight, bias = (*args, None)[:3]
        call = Call(x, node, node)
        out_in = True
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = args
        call = _between_reshapes(x, node)
        out_in = False
    elif node.target in (aten.matmul.default, aten.mm.default, operator.matmul):
        x, weight = args
        if _parameter(gm, weight, dim=3) is not None:
            return _match_other_kind(gm, node)
        call, bias = _with_bias_addition(gm, x, node)
        out_in = False
    else:
        return None
    source = _parameter(gm, weight, dim=2)
    bias_source = _parameter(gm, bias, dim=1) if bias is not None else None
    if source is None or (bias is not None and bias_source is None):
        return None
    kind = SiteKind(out_in == source.flipped, source.rows)
    return Match(call, source.name, kind, bias_source)


_CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
_BATCHED = (aten.bmm.default, aten.matmul.default, operator.matmul)
_OTHER_KINDS = (aten.embedding.default, *_CONVOLUTIONS, aten.bmm.default)
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def _match_other_kind(gm: fx.GraphModule, node: fx.Node) -> Match | None:
    """Return the match of `node` as an embedding, a convolution or experts, or None."""
    args = _arguments(node)
    kind: SiteKind
    if node.target is aten.embedding.default:
        if (source := _parameter(gm, args["weight"], dim=2)) is None or source.flipped or source.rows:
            return None
        kind = Lookup(padding=args["padding_idx"])
        return Match(Call(args["indices"], node, node), source.name, kind, None)
    if node.target in _CONVOLUTIONS:
        weight, bias = args["weight"], args["bias"]
        dims = 1 if node.target in _CONVOLUTIONS[:2] else 2
        source = _parameter(gm, weight, dim=2 + dims)
        bias_source = _parameter(gm, bias, dim=1) if bias is not None else None
        if source is None or (bias is not None and bias_source is None) or args["groups"] != 1:
            return None
        steps = {key: _for_each_dimension(args[key], dims) for key in ("stride", "padding", "dilation")}
        kind = Convolution(kernel=tuple(gm.get_parameter(source.name).shape[2:]), **steps)
        return Match(Call(args["input"], node, node), source.name, kind, bias_source)
    x, weight, *routing = (operand for operand in (*node.args, *node.kwargs.values()) if operand is not None)
    source = _parameter(gm, weight, dim=3)
    known = isinstance(x, fx.Node) and all("val" in getattr(operand, "meta", ()) for operand in routing)
    if source is None or source.rows or not known or len(routing) != (op_name(node) in _GROUPED):
        return None
    kind = Experts(transposed=not source.flipped, operator=node.target)
    return Match(Call(x, node, node, tuple(routing)), source.name, kind, None)  # type: ignore[arg-type]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by name, with its defaults."""
    named = dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            value = node.args[position] if position < len(node.args) else argument.default_value
            named.setdefault(argument.name, value)
    return named


def _for_each_dimension(value: Any, dims: int) -> Any:
    """Return a setting of a convolution as one value for each dimension; "same" and "valid" stay."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _between_reshapes(x: fx.Node, product: fx.Node) -> Call:
    """Return the call around `view(x, [-1, d_in])`, product, `view(_, [..., d_out])`, or around the product alone."""
    users = list(product.users)
    reshaped = _is_reshape(x) and len(x.users) == 1 and len(users) == 1 and _is_reshape(users[0])
    if not reshaped or not _keeps_last_dimension(users[0], product):
        return Call(x, product, product)
    return Call(x.all_input_nodes[0], users[0], product)


def _keeps_last_dimension(view: fx.Node, product: fx.Node) -> bool:
    """Return whether `view` keeps the last dimension of `product`."""
    return "val" in view.meta and bool(view.meta["val"].shape[-1:] == product.meta["val"].shape[-1:])


def _is_reshape(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (aten.view.default, aten.reshape.default)


def _with_bias_addition(gm: fx.GraphModule, x: fx.Node, product: fx.Node) -> tuple[Call, fx.Node | None]:
    """Return the call of `x @ W`, with the addition of a bias vector if nothing else reads the product."""
    users = list(product.users)
    if len(users) == 1 and users[0].target in (aten.add.Tensor, operator.add):
        others = [a for a in users[0].args if a is not product]
        if len(others) == 1 and isinstance(others[0], fx.Node) and _parameter(gm, others[0], dim=1):
            return Call(x, users[0], product), others[0]
    return Call(x, product, product), None


_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default)
_COPIES = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class _Source:
    """A parameter that a product reads.

    Args:
        name: its qualified name.
        flipped: whether it is transposed on the way.
        rows: the rows that are taken of it, as the first and the one after the last; None means all.
    """

    name: str
    flipped: bool
    rows: tuple[int, int] | None


def _parameter(gm: fx.GraphModule, node: object, dim: int) -> _Source | None:
    """Return the parameter of `dim` dimensions that `node` reads, through casts, transposes and splits by rows."""
    flipped, rows = False, None
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.op != "call_function":
            return None
        if node.target in _TRANSPOSES:
            if dim == 3 and not _swaps_last_two(node):
                return None
            flipped = not flipped
        elif node.target not in _COPIES:
            rows = _rows(node) if rows is None and not flipped else None
            if rows is None:
                return None
            node = node.all_input_nodes[0]
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or is_inserted(node):
        return None
    try:
        tensor = gm.get_parameter(str(node.target))
    except AttributeError:
        return None
    return _Source(str(node.target), flipped, rows) if tensor.dim() == dim else None


def _swaps_last_two(node: fx.Node) -> bool:
    dims: Any = node.args[1:]
    return node.target is aten.mT.default or (node.target is aten.transpose.int and {d % 3 for d in dims} == {1, 2})


def _rows(node: fx.Node) -> tuple[int, int] | None:
    """Return the rows of a tensor that `node` takes from its split, as in `nn.MultiheadAttention`, or None."""
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or op_name(split) not in ("chunk", "split", "split_with_sizes"):
        return None
    parts, index = split.meta.get("val"), node.args[1]
    if not isinstance(index, int) or parts is None or _arguments(split).get("dim", 0) != 0:
        return None
    start = sum(part.shape[0] for part in parts[:index])
    return start, start + parts[index].shape[0]
