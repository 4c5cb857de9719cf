"""Sites: the linear computations of a captured graph."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from .dataflow import Linear
from .provenance import inner_name, is_inserted
from .roles import infer_roles

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One execution of a site in the graph: from its input node `x` to its output node `y`.

    `node` is the matrix product in between; they differ where the product is wrapped in reshapes (`Conv1D`) or
    followed by a separate bias addition.
    """

    x: fx.Node
    y: fx.Node
    node: fx.Node


@dataclass(frozen=True)
class Site:
    """One linear computation: `y = x W^T + b` with a frozen `W (d_out, d_in)`.

    Args:
        name: qualified name of the module that owns the weight.
        d_in: size of the last dimension of the input.
        d_out: size of the last dimension of the output.
        roles: what it does in the model, see `roles.ROLES`; empty if the dataflow does not tell.
        weight: qualified name of the weight parameter.
        bias: qualified name of the bias parameter, or None.
        transposed: whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does.
        reasons: for each role, why.
        calls: where the graph runs it; several for a module used several times.
    """

    name: str
    d_in: int
    d_out: int
    roles: frozenset[str] = frozenset()
    weight: str = ""
    bias: str | None = None
    transposed: bool = False
    reasons: dict[str, str] = field(default_factory=dict, compare=False)
    calls: tuple[Call, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def layer(self) -> int | None:
        """The index of the layer it is in: the first number in its name, or None."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of a graph in order of first execution, adapted or not; adapters' own linears are no sites."""
    constants = _constants(gm.graph)
    matches = [match for node in gm.graph.nodes if (match := _match(gm, node)) is not None]
    # A linear that never sees data is no site; one that does is adapted at its calls on constants too.
    weights = {match.weight for match in matches if match.call.x not in constants}
    found = [match for match in matches if match.weight in weights]
    linears = [Linear(match.call.x, match.call.y) for match in found]
    infer_roles(gm.graph, [linear for linear in linears if linear.x not in constants])

    groups: dict[tuple[str, str], list[tuple[_Match, Linear]]] = defaultdict(list)
    for match, linear in zip(found, linears, strict=True):
        groups[_name(match), match.weight].append((match, linear))
    names = [name for name, _ in groups]
    sites = []
    for (name, weight), members in groups.items():
        if names.count(name) > 1:  # one module with several weights
            name = weight.removesuffix("_weight").removesuffix(".weight")
        first = members[0][0]
        reasons = {role: reason for _, linear in members for role, reason in linear.reasons.items()}
        shape = tuple(gm.get_parameter(weight).shape)
        d_out, d_in = shape[::-1] if first.transposed else shape
        sites.append(
            Site(
                name,
                d_in,
                d_out,
                frozenset(reasons),
                weight,
                first.bias,
                first.transposed,
                reasons,
                tuple(match.call for match, _ in members),
            )
        )
    return sites


# Finding linears, one dialect after the other.


@dataclass(frozen=True)
class _Match:
    call: Call
    weight: str
    transposed: bool
    bias: str | None


def _match(gm: fx.GraphModule, node: fx.Node) -> _Match | None:
    """`node` as the product of a linear over frozen parameters, or None."""
    if node.op != "call_function" or is_inserted(node):
        return None
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
        call, bias = _with_bias_addition(gm, x, node)
        out_in = False
    else:
        return None
    source = _parameter(gm, weight, dim=2)
    bias_source = _parameter(gm, bias, dim=1) if bias is not None else None
    if source is None or (bias is not None and bias_source is None):
        return None
    name, flipped = source
    return _Match(call, name, transposed=out_in == flipped, bias=bias_source and bias_source[0])


def _between_reshapes(x: fx.Node, product: fx.Node) -> Call:
    """The call around `view(x, [-1, d_in])`, product, `view(_, [..., d_out])`; only the product if it has none."""
    users = list(product.users)
    if not (
        _is_reshape(x) and len(x.users) == 1 and len(users) == 1 and _is_reshape(users[0]) and _last(users[0], product)
    ):
        return Call(x, product, product)
    return Call(x.all_input_nodes[0], users[0], product)


def _last(view: fx.Node, product: fx.Node) -> bool:
    """Whether `view` keeps the last dimension of `product`."""
    return "val" in view.meta and bool(view.meta["val"].shape[-1:] == product.meta["val"].shape[-1:])


def _is_reshape(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (aten.view.default, aten.reshape.default)


def _with_bias_addition(gm: fx.GraphModule, x: fx.Node, product: fx.Node) -> tuple[Call, fx.Node | None]:
    """The call of `x @ W`, with the addition of a bias vector if that is all that happens to the product."""
    users = list(product.users)
    if len(users) == 1 and users[0].target in (aten.add.Tensor, operator.add):
        others = [a for a in users[0].args if a is not product]
        if len(others) == 1 and isinstance(others[0], fx.Node) and _parameter(gm, others[0], dim=1):
            return Call(x, users[0], product), others[0]
    return Call(x, product, product), None


_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
_COPIES = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.detach.default, aten.alias.default)


def _parameter(gm: fx.GraphModule, node: object, dim: int) -> tuple[str, bool] | None:
    """The parameter of `dim` dimensions that `node` is, looked up through casts and transposes; and if transposed."""
    flipped = False
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.op != "call_function" or node.target not in (*_TRANSPOSES, *_COPIES):
            return None
        flipped ^= node.target in _TRANSPOSES
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or is_inserted(node):
        return None
    try:
        tensor = gm.get_parameter(str(node.target))
    except AttributeError:
        return None
    return (str(node.target), flipped) if tensor.dim() == dim else None


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of the graph."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and node.op == "call_function" and constants.issuperset(inputs)):
            constants.add(node)
    return constants


def _name(match: _Match) -> str:
    """The qualified name of a linear.

    The module stack names the module that ran, the weight's own path the module that owns it. They differ where
    a weight is tied (the stack is right) and where a module uses a child's weight functionally (the owner is).
    """
    owner, _, leaf = match.weight.rpartition(".")
    stack = inner_name(match.call.node)
    if stack is None or owner == stack or owner.startswith(f"{stack}." if stack else ""):
        return owner if leaf == "weight" or not leaf.endswith("weight") else f"{owner}.{leaf[: -len('_weight')]}"
    return stack


def span(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """The nodes that `y` computes from `x`, `x` excluded and `y` included, in graph order."""
    needed, stack = {y}, [y]
    while stack:
        for operand in stack.pop().all_input_nodes:
            # The graph is in topological order: what stands before `x` does not depend on it.
            if x < operand and operand not in needed:
                needed.add(operand)
                stack.append(operand)
    reached: set[fx.Node] = {x}
    for node in sorted(needed):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return sorted(reached - {x})
