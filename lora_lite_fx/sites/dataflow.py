"""The dataflow of a graph with linears: which operations carry a value on, and where the residual stream is.

The *residual stream* consists of the additions that join a value with something computed from it by linears, and of the
values that they add to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..graph.walk import walk

# Operations are known by their plain name in lower case. `aten.add.Tensor`, `operator.add` and the method `add` are all
# "add". A module that is called as a leaf has the name of its class.
TRANSPOSES = frozenset({"transpose", "t", "numpy_t", "mt", "swapaxes"})
# fmt: off
SPLITS = frozenset({
    "split", "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "narrow", "tensor_split",
})
SHAPES = TRANSPOSES | {
    "view", "reshape", "flatten", "unflatten", "permute", "movedim", "contiguous", "clone", "expand", "expand_as",
    "broadcast_to", "view_as", "unsqueeze", "squeeze", "repeat", "repeat_interleave", "index", "index_select", "roll",
    "pad", "cat", "stack",
}
CASTS = frozenset({
    "to", "type_as", "float", "half", "bfloat16", "double", "type", "detach", "alias", "identity", "dropout",
    "dropout_",
})
NORMS = frozenset({
    "layer_norm", "layernorm", "rms_norm", "rmsnorm", "group_norm", "groupnorm", "batch_norm", "batchnorm1d",
    "native_layer_norm", "linalg_vector_norm", "pow", "square", "mean", "rsqrt", "sqrt", "var",
})
POOLS = frozenset({"adaptive_avg_pool1d", "adaptiveavgpool1d", "adaptive_avg_pool2d", "adaptiveavgpool2d"})
ARITHMETIC = frozenset({
    "add", "sub", "mul", "div", "neg", "rsub", "add_", "mul_", "div_", "iadd", "isub", "imul", "itruediv", "truediv",
    "masked_fill", "where", "clamp", "max", "maximum", "minimum", "by_mode",
})
CARRY = SPLITS | SHAPES | CASTS | NORMS | POOLS | ARITHMETIC
"""Operations that carry a value on: their result holds it, in whatever shape, scale, mask, mean or norm."""
ACTIVATIONS = frozenset({
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "tanh", "sigmoid", "elu", "leaky_relu", "hardswish", "mish",
    "softplus", "hardtanh", "glu", "function",
})
# fmt: on
SOFTMAXES = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax"})
ADDS = frozenset({"add", "add_", "iadd"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "take"})
SIZES = frozenset({"size", "sym_size", "dim", "getattr"})
PLAIN_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins"})
"""The packages of functions whose meaning is known by their name."""


def op_name(node: fx.Node) -> str:
    """Return the plain lower-case name of the operation of `node`, whatever the dialect of its graph.

    A call of an autograd function of one tensor, such as Bloom's GELU, is a "function".
    """
    if hasattr(node.target, "autograd_function") and len(node.all_input_nodes) == 1:
        return "function"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    elif node.op == "call_module":
        assert node.graph.owning_module is not None
        name = type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    else:
        name = str(node.target) if node.op == "call_method" else node.op
    return name.lower()


def nodes_with_data(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the inputs of a graph, and not on their sizes alone."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (op_name(node) not in SIZES and not data.isdisjoint(node.all_input_nodes)):
            data.add(node)
    return data


@dataclass
class LinearNode:
    """A linear in the graph as role inference sees it.

    Args:
        x: the input node.
        y: the output node.
        reasons: its roles, each with the reason.
    """

    x: fx.Node
    y: fx.Node
    reasons: dict[str, str] = field(default_factory=dict)

    def give(self, role: str, reason: str) -> None:
        """Give the linear a role. The first reason for it counts."""
        self.reasons.setdefault(role, reason)


class Dataflow:
    """A graph with its linears, and walks through it.

    Args:
        graph: the graph, which is not changed.
        linears: the linears in it, in order of execution.

    Attributes:
        ops: the plain name of every node.
        data: the nodes with data, see `nodes_with_data`.
        by_y: the linear with this output node.
        by_x: the linears with this input node.
        written: the nodes that are copied into a tensor, or into a view of it, after it was made.
        joins: the additions to the residual stream, each with the node that it adds to.
        skips: the nodes that are added to.
    """

    def __init__(self, graph: fx.Graph, linears: list[LinearNode]) -> None:
        self.graph = graph
        self.linears = linears
        self.by_y = {linear.y: linear for linear in linears}
        self.by_x: dict[fx.Node, list[LinearNode]] = defaultdict(list)
        for linear in linears:
            self.by_x[linear.x].append(linear)
        self.ops = {node: op_name(node) for node in graph.nodes}
        self.data = nodes_with_data(graph)
        self.written = self._written()
        self.joins = self._residual_joins()
        self.skips = set(self.joins.values())

    def behind(self, start: Any, through: frozenset[str] = CARRY) -> Iterator[fx.Node]:
        """Yield the nodes that `start` carries forward, with itself, up to and with linears and residual joins."""

        def inputs(node: fx.Node) -> Iterable[fx.Node]:
            ends = node in self.by_y or node in self.joins or self.ops[node] not in through
            return [*self.written.get(node, ()), *(() if ends else node.all_input_nodes)]

        return walk([start], inputs)

    def ahead(self, start: fx.Node, through: frozenset[str] = CARRY) -> Iterator[fx.Node]:
        """Yield the nodes that carry `start` forward, with itself, up to and with nodes that do not or that join."""

        def users(node: fx.Node) -> Iterable[fx.Node]:
            ends = node is not start and (node in self.joins or self.ops[node] not in through)
            return () if ends else node.users

        return walk([start], users)

    def sources(self, node: Any, through: frozenset[str] = CARRY) -> list[LinearNode]:
        """Return the linears whose outputs `node` carries forward."""
        return [self.by_y[n] for n in self.behind(node, through) if n in self.by_y]

    def readers(self, node: fx.Node) -> list[LinearNode]:
        """Return the linears that read `node` or nodes that carry it forward, up to linears and residual joins."""
        carried = (n for n in self.ahead(node) if n is node or (self.ops[n] in CARRY and n not in self.joins))
        return [linear for n in carried if n is node or n not in self.by_y for linear in self.by_x.get(n, ())]

    def _written(self) -> dict[fx.Node, list[fx.Node]]:
        """Return the nodes that are copied into a tensor, or into a view of it, after it was made."""
        written: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            if self.ops[node] == "copy_" and all(isinstance(a, fx.Node) for a in node.args[:2]):
                target = node.args[0]
                while self.ops[target] in SPLITS | SHAPES and target.all_input_nodes:
                    target = target.all_input_nodes[0]
                written[target].append(node.args[1])
        return written

    def _residual_joins(self) -> dict[fx.Node, fx.Node]:
        """Return the additions `h + f(h)` with a linear in `f`, each with its `h`."""
        index = {node: i for i, node in enumerate(self.graph.nodes)}
        before: dict[fx.Node, int] = {}  # bit i: node i is this node or computed before it on some path to it
        for node in self.graph.nodes:
            bits = 1 << index[node]
            for operand in node.all_input_nodes:
                bits |= before[operand]
            before[node] = bits
        linear_bits = 0
        by_index = {}
        for linear in self.linears:
            linear_bits |= 1 << index[linear.y]
            by_index[index[linear.y]] = linear

        def computed_by_linears(branch: fx.Node, skip: fx.Node) -> bool:
            if not before[branch] >> index[skip] & 1:
                return False
            between = before[branch] & linear_bits & ~before[skip]
            return any(before[by_index[i].x] >> index[skip] & 1 for i in _bits(between))

        joins: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if self.ops[node] not in ADDS or len(operands) != 2:
                continue
            for skip, branch in (operands, operands[::-1]):
                # The skip may pass a cast, a reshape or a dropout of its own before the addition. If blocks run in
                # parallel, `h + f(h) + g(h)`, the second addition adds to the first.
                while not computed_by_linears(branch, skip):
                    if skip in joins:
                        skip = joins[skip]
                    elif self.ops[skip] in CASTS | SHAPES and skip.all_input_nodes:
                        skip = skip.all_input_nodes[0]
                    else:
                        break
                else:
                    joins[node] = skip
        return joins


def _bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, the lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
