"""What every dialect needs: the match of a product, and the frozen tensors that a graph reads as operands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..compat.torch import TO_COPY, UNSAFE_VIEW, OpOverload, schema_of
from ..graph.insertion import is_inserted, replaced_tensor
from ..graph.queries import value_of
from .computed import Computation, name_and_shape
from .dataflow import op_name
from .kinds.site_kind import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One execution of a site in the graph: from its input node `x` to its output node `y`.

    Args:
        x: the input.
        y: the output.
        node: the product in between. It is not `y` if the product is wrapped in reshapes (`Conv1D`) or followed by a
            separate bias addition.
        routing: the other inputs of the product. A grouped product takes the end of each expert's tokens.
        computed_weight: the node that is the stored weight, if the graph computes it; None for a parameter.
        computed_bias: the node that is the bias, if the graph computes it; None for a parameter.
    """

    x: fx.Node
    y: fx.Node
    node: fx.Node
    routing: tuple[fx.Node, ...] = ()
    computed_weight: fx.Node | None = None
    computed_bias: fx.Node | None = None


@dataclass(frozen=True)
class FrozenTensor:
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
    weight: FrozenTensor
    kind: SiteKind
    bias: FrozenTensor | None = None

    def __post_init__(self) -> None:
        bias = self.bias.computed if self.bias is not None else None
        object.__setattr__(self, "call", replace(self.call, computed_weight=self.weight.computed, computed_bias=bias))


@dataclass(frozen=True)
class Dialect:
    """A way in which a graph may write a product with a frozen weight.

    Args:
        operators: the operators that may be such a product; a text stands for any function of this plain name.
        match: takes the graph and a call of such an operator. Returns the match, or None if it is not one.
        kinds: the kinds of the sites that it finds.
    """

    operators: tuple[object, ...]
    match: Callable[[FrozenReader, fx.Node], Match | None]
    kinds: tuple[type[SiteKind], ...]


_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default)
_COPIES = (
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, TO_COPY),
    *(aten.detach.default, aten.alias.default, aten.clone.default),
)
_BROADCASTS = (aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default)


class FrozenReader:
    """Reads the frozen operands of products in a graph.

    Args:
        gm: the graph module.
        frozen: the values that may be weights and biases without being parameters, see `frozen_values`.
    """

    def __init__(self, gm: fx.GraphModule, frozen: Container[fx.Node] = ()) -> None:
        self.gm, self.frozen = gm, frozen

    def tensor(self, node: object, dim: int, product: fx.Node, exact: bool = False) -> FrozenTensor | None:
        """Return the frozen tensor that `product` reads as `node`: a parameter, or computed from some.

        Args:
            node: the operand.
            dim: the number of dimensions of the tensor.
            product: the node that reads it.
            exact: whether nothing may stand between the tensor and the product but casts. So it is for a weight of
                more than two dimensions.
        """
        parameter = self.parameter(node, dim)
        if parameter is not None and not ((exact or dim > 2) and (parameter.flipped or parameter.rows)):
            return parameter
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
        if not isinstance(node, fx.Node) or node not in self.frozen:
            return None
        named = name_and_shape(self.gm, node, dim, product)
        return None if named is None else FrozenTensor(named[0], flipped, None, named[1], node)

    def parameter(self, node: object, dim: int) -> FrozenTensor | None:
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
                if not self._repeats(node, dim):
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
            tensor = self.gm.get_parameter(str(node.target))
        except AttributeError:
            return None
        return FrozenTensor(str(node.target), flipped, rows, tensor.shape) if tensor.dim() == dim else None

    def _repeats(self, node: fx.Node, dim: int) -> bool:
        """Check whether `node` repeats a matrix along dimensions before it; other parameters must stay as they are."""
        was, now = self._shape(node.all_input_nodes[0]), self._shape(node)
        if was is None or now is None:
            return False
        return was[-2:] == now[-2:] and len(was) >= 2 if dim == 2 else was == now

    def between_reshapes(self, x: fx.Node, product: fx.Node, all_dimensions: bool = False) -> Call:
        """Return the call from before the reshapes of the input to after those of the product.

        GPT-2 writes `view(x, [-1, d_in])`, product, `view(_, [..., d_out])`, and decompositions of linears do so too.
        The call is the product alone if the reshapes do not cancel each other out.

        Args:
            x: the input of the product.
            product: the product.
            all_dimensions: whether reshapes must leave all dimensions as they are; else the last one.
        """

        def reshapes(start: fx.Node, following: Callable[[fx.Node], fx.Node | None]) -> list[fx.Node]:
            """Return `start` and the values that it is reshaped from, or to, while it keeps its last dimension."""
            nodes = [start]
            while (node := following(nodes[-1])) is not None:
                was, now = self._shape(nodes[-1]), self._shape(node)
                if was is None or now is None or was[-1:] != now[-1:] or (all_dimensions and was != now):
                    break
                nodes.append(node)
            return nodes

        def before(node: fx.Node) -> fx.Node | None:
            return node.all_input_nodes[0] if self._is_reshape(node) and len(node.users) == 1 else None

        def after(node: fx.Node) -> fx.Node | None:
            users = list(node.users)
            return users[0] if len(users) == 1 and self._is_reshape(users[0]) else None

        def cancel_out(start: fx.Node, end: fx.Node) -> bool:
            was, now = self._shape(start), self._shape(end)
            return was is not None and now is not None and was[:-1] == now[:-1]

        inputs, outputs = reshapes(x, before), reshapes(product, after)
        pairs = ((start, end) for start in reversed(inputs) for end in reversed(outputs) if cancel_out(start, end))
        start, end = next(pairs, (x, product))
        return Call(start, end, product)

    def _shape(self, node: fx.Node) -> tuple[str, ...] | None:
        """Return the sizes of a value as text, because comparing symbols would add guards; None if unknown."""
        value = value_of(self.gm, node)
        return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None

    def _is_reshape(self, node: fx.Node) -> bool:
        """Check whether `node` gives all elements of its operand another shape, in the same order."""
        if node.op != "call_function":
            return False
        if node.target in (aten.expand.default, aten.clone.default):
            return self._shape(node) == self._shape(node.all_input_nodes[0])
        return node.target in (aten.view.default, aten.reshape.default, UNSAFE_VIEW)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by name, with its defaults."""
    named = dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for position, argument in enumerate(schema_of(node.target).arguments):
            value = node.args[position] if position < len(node.args) else argument.default_value
            named.setdefault(argument.name, value)
    return named


def _swaps_last_two(node: fx.Node, dim: int) -> bool | None:
    """Return whether a transpose of a matrix, or of `dim` dimensions, swaps the last two; None if it moves others."""
    if node.target is aten.mT.default:
        return True
    value = node.meta.get("val")
    rank = value.dim() if isinstance(value, Tensor) else dim
    args = arguments_of(node)
    dims = list(range(rank))
    if node.target is aten.transpose.int:
        named = [args["dim0"], args["dim1"]]
    else:
        named = list(args["dims"]) if node.target is aten.permute.default else dims[::-1]
    if not all(isinstance(d, int) and -rank <= d < rank for d in named):
        return None  # without shapes, this shows that it is another tensor
    moved = [dims[d] for d in named]
    if node.target is aten.transpose.int:
        first, second = moved
        moved = [{first: second, second: first}.get(d, d) for d in dims]
    return {tuple(dims): False, (*dims[:-2], *reversed(dims[-2:])): True}.get(tuple(moved))


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
    if not isinstance(index, int) or parts is None or arguments_of(split).get("dim", 0) != 0:
        return None
    start = sum(part.shape[0] for part in parts[:index])
    return start, start + parts[index].shape[0]
