"""Roles: what a linear does in its model, inferred from dataflow and never from names.

Three facts of the graph carry the inference. *Attention* is a product of probabilities with values, fused
(`scaled_dot_product_attention`) or spelled out around a softmax; its arguments name queries, keys and values.
The *residual stream* is where an addition joins a value with something computed from it by linears. And a
*feed-forward* block is an activation between a linear and one that writes the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

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
"""The roles and what each says of a site. A fused projection has several."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
"""Names for several roles at once."""

# Operations are known by their plain name, in lower case: `aten.add.Tensor`, `operator.add` and the method
# `add` are all "add"; a module called as a leaf is its class name.
_TRANSPOSES = frozenset(["transpose", "t", "numpy_t", "mt", "swapaxes"])
_SPLITS = frozenset(
    ["split", "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "narrow", "tensor_split"]
)
_SHAPES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
        "numpy_t",
        "mt",
        "movedim",
        "swapaxes",
        "contiguous",
        "clone",
        "expand",
        "expand_as",
        "view_as",
        "unsqueeze",
        "squeeze",
        "repeat",
        "repeat_interleave",
        "index",
        "index_select",
        "roll",
        "pad",
        "cat",
        "stack",
    ]
)
_CASTS = frozenset(
    [
        "to",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "detach",
        "alias",
        "identity",
        "dropout",
        "dropout_",
    ]
)
_NORMS = frozenset(
    [
        "layer_norm",
        "layernorm",
        "rms_norm",
        "rmsnorm",
        "group_norm",
        "groupnorm",
        "batch_norm",
        "batchnorm1d",
        "native_layer_norm",
        "pow",
        "mean",
        "rsqrt",
        "sqrt",
        "var",
    ]
)
_ARITHMETIC = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "rsub",
        "add_",
        "mul_",
        "iadd",
        "imul",
        "truediv",
        "masked_fill",
        "where",
        "clamp",
    ]
)
_CARRY = _SPLITS | _SHAPES | _CASTS | _NORMS | _ARITHMETIC
_ACTIVATIONS = frozenset(
    [
        "relu",
        "relu_",
        "relu6",
        "gelu",
        "silu",
        "silu_",
        "tanh",
        "sigmoid",
        "elu",
        "leaky_relu",
        "hardswish",
        "mish",
        "softplus",
        "hardtanh",
    ]
)
_SOFTMAXES = frozenset(["softmax", "_softmax", "log_softmax", "_log_softmax"])
_ADDS = frozenset(["add", "add_", "iadd"])
_PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum"])
_FUSED_ATTENTION = frozenset(["scaled_dot_product_attention"])


def op_name(node: fx.Node) -> str:
    """The plain lower-case name of what `node` computes, whatever the dialect of its graph."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    elif node.op == "call_module":
        assert node.graph.owning_module is not None
        name = type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    else:
        name = str(node.target) if node.op == "call_method" else node.op
    return name.lower()


@dataclass
class Linear:
    """A linear in the graph as role inference sees it: input node `x`, output node `y`, and the roles found."""

    x: fx.Node
    y: fx.Node
    reasons: dict[str, str] = field(default_factory=dict)

    def give(self, role: str, reason: str) -> None:
        self.reasons.setdefault(role, reason)


def infer_roles(graph: fx.Graph, linears: Iterable[Linear]) -> None:
    """Fill the `reasons` (role to its reason) of every linear. Where the dataflow leaves a doubt, it gives none."""
    _Inference(graph, list(linears)).run()


class _Inference:
    def __init__(self, graph: fx.Graph, linears: list[Linear]) -> None:
        self.graph = graph
        self.linears = linears
        self.by_y = {linear.y: linear for linear in linears}
        self.by_x: dict[fx.Node, list[Linear]] = defaultdict(list)
        for linear in linears:
            self.by_x[linear.x].append(linear)
        self.ops = {node: op_name(node) for node in graph.nodes}
        self.joins, self.skips = self._residual_joins()

    def run(self) -> None:
        self._attention()
        self._residual_stream()
        self._feed_forward()
        self._head()

    # Walking.

    def _behind(self, start: fx.Node, through: frozenset[str] = _CARRY) -> Iterator[fx.Node]:
        """Nodes that `start` carries forward, itself included, up to linears and residual joins (both included)."""

        def inputs(node: fx.Node) -> Iterable[fx.Node]:
            ends = node in self.by_y or node in self.joins or self.ops[node] not in through
            return () if ends else node.all_input_nodes

        return _walk(start, inputs)

    def _ahead(self, start: fx.Node, through: frozenset[str] = _CARRY) -> Iterator[fx.Node]:
        """Nodes that carry `start` forward, itself included, up to (including) what does not, or joins a residual."""

        def users(node: fx.Node) -> Iterable[fx.Node]:
            ends = node is not start and (node in self.joins or self.ops[node] not in through)
            return () if ends else node.users

        return _walk(start, users)

    def _sources(self, node: fx.Node) -> list[Linear]:
        return [self.by_y[n] for n in self._behind(node) if n in self.by_y]

    # The residual stream.

    def _residual_joins(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The additions `h + f(h)` with a linear in `f`, and their `h`."""
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

        joins, skips = set(), set()
        for node in self.graph.nodes:
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if self.ops[node] not in _ADDS or len(operands) != 2:
                continue
            for skip, branch in (operands, operands[::-1]):
                # The skip may pass a cast, a reshape or a dropout of its own before the addition.
                while not computed_by_linears(branch, skip):
                    if self.ops[skip] not in _CASTS | _SHAPES or not skip.all_input_nodes:
                        break
                    skip = skip.all_input_nodes[0]
                else:
                    joins.add(node)
                    skips.add(skip)
        return joins, skips

    def _residual_stream(self) -> None:
        stream = self.joins | self.skips
        if not stream:
            return
        for linear in self.linears:
            if any(node in stream for node in self._behind(linear.x) if node not in self.by_y):
                linear.give("reader", "its input is carried over from the residual stream")
            if any(node in self.joins for node in self._ahead(linear.y)):
                linear.give("writer", "its output is carried into an addition to the residual stream")
            if not linear.reasons.keys() & {"reader", "writer"}:
                linear.give("inner", "its input and output are off the residual stream")

    # Attention.

    def _attention(self) -> None:
        for node in self.graph.nodes:
            if self.ops[node] in _FUSED_ATTENTION:
                found = dict(zip(("query", "key", "value"), node.args[:3], strict=False))
                found |= {k: v for k, v in node.kwargs.items() if k in ("query", "key", "value")}
                self._give_attention(found, node)
            elif self.ops[node] in ("softmax", "_softmax"):
                for scores, result, values in self._around_softmax(node):
                    query, key = _query_and_key(scores, node, self._is_transposed(scores, node))
                    self._give_attention({"query": query, "key": key, "value": values}, result)

    def _around_softmax(self, softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
        """(score product, result product, values) of an attention whose probabilities are `softmax`."""
        # Scores may be scaled, masked, biased and soft-capped (a tanh) on their way to the softmax.
        behind = _walk(
            softmax.all_input_nodes[0],
            lambda n: n.all_input_nodes if self.ops[n] in _CARRY or self.ops[n] == "tanh" else (),
        )
        scores = [n for n in behind if self.ops[n] in _PRODUCTS and n not in self.by_y]
        for result in self._ahead(softmax):
            if self.ops[result] not in _PRODUCTS or len(scores) != 1:
                continue
            first, second = _factors(result)
            probable = [self._carries(softmax, factor) for factor in (first, second)]
            if probable.count(True) == 1:
                yield scores[0], result, second if probable[0] else first

    def _is_transposed(self, scores: fx.Node, softmax: fx.Node) -> bool:
        """Whether the scores are transposed on their way to the softmax."""
        through = _CARRY | {"tanh"}
        flipped, node = False, softmax
        while node is not scores:
            flipped ^= self.ops[node] in _TRANSPOSES
            node = next(
                n
                for n in node.all_input_nodes
                if scores in _walk(n, lambda m: m.all_input_nodes if self.ops[m] in through else ())
            )
        return flipped

    def _carries(self, source: fx.Node, node: Any) -> bool:
        return source in _walk(node, lambda n: n.all_input_nodes if self.ops[n] in _CARRY else ())

    def _give_attention(self, arguments: Mapping[str, Any], result: fx.Node) -> None:
        for role, argument in arguments.items():
            if isinstance(argument, fx.Node):
                for linear in self._sources(argument):
                    linear.give(role, f"its output is the {role} of {result.name}")
        for node in self._ahead(result):
            carried = node is result or (self.ops[node] in _CARRY and node not in self.joins)
            for linear in self.by_x.get(node, ()) if carried and node not in self.by_y else ():
                linear.give("output", f"it reads the result of {result.name}")

    # Feed-forward.

    def _feed_forward(self) -> None:
        for down in self.linears:
            if "writer" not in down.reasons or "output" in down.reasons:
                continue
            carried = set(self._sources_ids(down.x, _CARRY))
            # Linears behind an activation: those reached only by walking through one, or by both ways.
            activated = set()
            for node in self._behind(down.x, _CARRY | _ACTIVATIONS):
                if self.ops[node] in _ACTIVATIONS and node not in self.by_y:
                    activated |= set(self._sources_ids(node, _CARRY | _ACTIVATIONS))
            if not activated:
                continue
            plain = carried - activated
            down.give("down", "it reads activated outputs of linears and writes the residual stream")
            for linear in self.linears:
                if id(linear) in activated and (plain or self._is_split(linear, down)):
                    linear.give("gate", f"its output is activated and gates the input of {down.y.name}")
                if id(linear) in plain or (id(linear) in activated and (not plain or self._is_split(linear, down))):
                    linear.give("up", f"its output makes up the input of {down.y.name}")

    def _sources_ids(self, node: fx.Node, through: frozenset[str]) -> Iterator[int]:
        nodes = self._behind(node, through) if node in self.by_y or self.ops[node] in through else iter(())
        return (id(self.by_y[n]) for n in nodes if n in self.by_y)

    def _is_split(self, linear: Linear, down: Linear) -> bool:
        """Whether gate and up are halves of one linear's output: it is split on the way to `down`."""
        between = set(self._behind(down.x, _CARRY | _ACTIVATIONS))
        return any(self.ops[n] in _SPLITS and n in between for n in linear.y.users)

    # Head.

    def _head(self) -> None:
        body = {role for group in GROUPS.values() for role in group}
        for linear in self.linears:
            if body.isdisjoint(linear.reasons) and "writer" not in linear.reasons:
                ahead = self._ahead(linear.y, _CARRY | _ACTIVATIONS | _SOFTMAXES)
                if any(node.op == "output" for node in ahead):
                    linear.give("head", "its output is an output of the model")


def _factors(product: fx.Node) -> tuple[Any, Any]:
    """The two factors of a matrix product node (`baddbmm` adds its first argument, `einsum` names its equation)."""
    if op_name(product) == "matmul" or op_name(product) == "bmm":
        return product.args[0], product.args[1]
    factors = [n for a in product.args[1:] for n in (a if isinstance(a, (list, tuple)) else [a])]
    return factors[0], factors[1]


def _query_and_key(scores: fx.Node, softmax: fx.Node, transposed: bool) -> tuple[Any, Any]:
    """The factors of a score product: the key is the one whose axis the softmax normalises."""
    first, second = _factors(scores)
    dim: Any = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim", -1)
    if "val" in softmax.meta and isinstance(dim, int):
        dim = dim % softmax.meta["val"].dim() - softmax.meta["val"].dim()
    if transposed and dim in (-1, -2):
        dim = -3 - dim
    key_first: bool = dim == -2
    if op_name(scores) == "einsum":
        # Written with lists, without "->", or with a dimension counted from the front past an ellipsis: a doubt.
        equation = scores.args[0] if isinstance(scores.args[0], str) else ""
        inputs, _, output = equation.replace(" ", "").partition("->")
        left, _, right = inputs.partition(",")
        counted = isinstance(dim, int) and -len(output) <= dim < (0 if "." in output else len(output))
        if not counted or (output[dim] in left) == (output[dim] in right):
            return None, None
        key_first = output[dim] in left
    return (second, first) if key_first else (first, second)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _walk(start: Any, following: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Each node reached from `start` once, depth first."""
    if not isinstance(start, fx.Node):
        return
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        yield node
        for other in following(node):
            if other not in seen:
                seen.add(other)
                stack.append(other)
