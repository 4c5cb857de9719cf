"""Sites: the linear computations of a captured graph."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .dataflow import Linear, op_name
from .experts import Experts
from .products import Convolution, Lookup, Product
from .provenance import inner_name, is_inserted
from .roles import infer_roles

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One execution of a site in the graph: from its input node `x` to its output node `y`.

    `node` is the matrix product in between; they differ where the product is wrapped in reshapes (`Conv1D`) or
    followed by a separate bias addition. `routing` is what it takes besides: of a grouped product, where the tokens of
    each expert end.
    """

    x: fx.Node
    y: fx.Node
    node: fx.Node
    routing: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Site:
    """One linear computation: `y = x W^T + b` with a frozen `W (d_out, d_in)`, or another product that is linear in it.

    Args:
        name: qualified name of the module that owns the weight; of one of its several weights,
            `<module>.sites.<parameter>`, or the parameter's name less `_weight`.
        d_in: size of the last dimension of the input; of an embedding the number of ids, of a convolution that of the
            channels times the size of the kernel.
        d_out: size of the last dimension of the output; of a convolution, the number of channels.
        roles: what it does in the model, see `roles.ROLES`; empty if the dataflow does not tell.
        weight: qualified name of the weight parameter.
        bias: qualified name of the bias parameter, or None.
        product: what it does with the weight: its kind, and the layout.
        bias_rows: of the bias parameter, where the bias is a part of it: the first and the one after the last; None
            for all.
        experts: how many experts have a `W` in the weight; 0 for a site that is no stack of experts.
        reasons: for each role, why.
        calls: where the graph runs it; several for a module used several times.
    """

    name: str
    d_in: int
    d_out: int
    roles: frozenset[str] = frozenset()
    weight: str = ""
    bias: str | None = None
    product: Product = field(default_factory=Product)
    bias_rows: tuple[int, int] | None = None
    experts: int = 0
    reasons: dict[str, str] = field(default_factory=dict, compare=False)
    calls: tuple[Call, ...] = field(default=(), compare=False, repr=False)

    @property
    def kind(self) -> str:
        """One of `products.KINDS`."""
        return self.product.kind

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as `(d_in, d_out)`, as GPT-2's `Conv1D` does."""
        return self.product.transposed

    def own_bias(self, stored: Tensor | None) -> Tensor | None:
        """The bias `(d_out,)`, from the parameter that it is a part of."""
        return stored if stored is None or self.bias_rows is None else stored[slice(*self.bias_rows)]

    def stored_bias(self, bias: Tensor, like: Tensor) -> Tensor:
        """`bias (d_out,)` as the model stores it; rows of other sites are those of `like`."""
        if self.bias_rows is None:
            return bias
        start, end = self.bias_rows
        return torch.cat([like[:start], bias, like[end:]])

    @cached_property
    def layer(self) -> int | None:
        """The index of the layer it is in: the first number in its name, or None."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of a graph in order of first execution, adapted or not; adapters' own linears are no sites."""
    constants = _constants(gm.graph)
    matches = [match for node in gm.graph.nodes if (match := _match(gm, node)) is not None]
    # What never sees data is no site; what does is adapted at its calls on constants too.
    seeing = {(match.weight, match.product) for match in matches if match.call.x not in constants}
    found = [match for match in matches if (match.weight, match.product) in seeing]
    linears = {id(match): Linear(match.call.x, match.call.y) for match in found if match.product.kind == "linear"}
    infer_roles(gm.graph, [linear for linear in linears.values() if linear.x not in constants])

    groups: dict[tuple[str, str, Product], list[_Match]] = defaultdict(list)
    for match in found:
        groups[_name(match), match.weight, match.product].append(match)
    names = Counter((name, product.kind == "linear") for name, _, product in groups)
    sites = []
    for (name, weight, product), members in groups.items():
        if name == weight or names[name, product.kind == "linear"] > 1:
            name = _name_in_module(weight, product)
        elif product.kind != "linear" and names[name, True]:  # an embedding whose weight is a head too
            name = f"{name}.sites.{product.kind}"
        if product.kind == "embedding" and _is_same(gm, f"{name}.weight", weight):
            weight = f"{name}.weight"  # the graph may read it by the name of a head that is tied to it
        roles = (linears[id(match)].reasons for match in members if id(match) in linears)
        reasons = {role: reason for each in roles for role, reason in each.items()}
        *experts, d_out, d_in = product.matrix(gm.get_parameter(weight).detach()).shape
        sites.append(
            Site(
                name,
                d_in,
                d_out,
                frozenset(reasons),
                weight,
                members[0].bias.name if members[0].bias else None,
                product,
                members[0].bias.rows if members[0].bias else None,
                experts[0] if experts else 0,
                reasons,
                tuple(match.call for match in members),
            )
        )
    return sites


# Finding linears, one dialect after the other.


@dataclass(frozen=True, eq=False)
class _Match:
    call: Call
    weight: str
    product: Product
    bias: _Source | None


def _match(gm: fx.GraphModule, node: fx.Node) -> _Match | None:
    """`node` as the product of a site over frozen parameters, or None."""
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
    product = Product(out_in == source.flipped, source.rows)
    return _Match(call, source.name, product, bias_source)


_CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
_BATCHED = (aten.bmm.default, aten.matmul.default, operator.matmul)
_OTHER_KINDS = (aten.embedding.default, *_CONVOLUTIONS, aten.bmm.default)
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def _match_other_kind(gm: fx.GraphModule, node: fx.Node) -> _Match | None:
    args = _arguments(node)
    product: Product
    if node.target is aten.embedding.default:
        if (source := _parameter(gm, args["weight"], dim=2)) is None or source.flipped or source.rows:
            return None
        product = Lookup(padding=args["padding_idx"])
        return _Match(Call(args["indices"], node, node), source.name, product, None)
    if node.target in _CONVOLUTIONS:
        weight, bias = args["weight"], args["bias"]
        dims = 1 if node.target in _CONVOLUTIONS[:2] else 2
        source = _parameter(gm, weight, dim=2 + dims)
        bias_source = _parameter(gm, bias, dim=1) if bias is not None else None
        if source is None or (bias is not None and bias_source is None) or args["groups"] != 1:
            return None
        steps = {key: _each(args[key], dims) for key in ("stride", "padding", "dilation")}
        product = Convolution(kernel=tuple(gm.get_parameter(source.name).shape[2:]), **steps)
        return _Match(Call(args["input"], node, node), source.name, product, bias_source)
    x, weight, *routing = (operand for operand in (*node.args, *node.kwargs.values()) if operand is not None)
    source = _parameter(gm, weight, dim=3)
    known = isinstance(x, fx.Node) and all("val" in getattr(operand, "meta", ()) for operand in routing)
    if source is None or source.rows or not known or len(routing) != (op_name(node) in _GROUPED):
        return None
    product = Experts(transposed=not source.flipped, operator=node.target)
    return _Match(Call(x, node, node, tuple(routing)), source.name, product, None)  # type: ignore[arg-type]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, with its defaults."""
    named = dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            given = node.args[position] if position < len(node.args) else argument.default_value
            named.setdefault(argument.name, given)
    return named


def _each(value: Any, dims: int) -> Any:
    """A setting of a convolution for each dimension; "same" and "valid" as they are."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


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


_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default)
_COPIES = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class _Source:
    """A parameter, whether it is transposed, and which of its rows are taken (None: all)."""

    name: str
    flipped: bool
    rows: tuple[int, int] | None


def _parameter(gm: fx.GraphModule, node: object, dim: int) -> _Source | None:
    """The parameter of `dim` dimensions that `node` is, looked up through casts, transposes and splits by rows."""
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
    """The rows that `node` is of a tensor split by rows, as `nn.MultiheadAttention` does; None if it is not that."""
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or op_name(split) not in ("chunk", "split", "split_with_sizes"):
        return None
    parts, index = split.meta.get("val"), node.args[1]
    if not isinstance(index, int) or parts is None or _arguments(split).get("dim", 0) != 0:
        return None
    start = sum(part.shape[0] for part in parts[:index])
    return start, start + parts[index].shape[0]


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
    if isinstance(match.product, Experts):
        return match.weight
    if stack is None or owner == stack or owner.startswith(f"{stack}." if stack else ""):
        return owner if leaf == "weight" or not leaf.endswith("weight") else f"{owner}.{leaf[: -len('_weight')]}"
    return stack


def is_called(model: nn.Module, site: Site) -> bool:
    """Whether `site` is a module of `model` of its own, and runs only by a call of it."""
    owner = site.weight.rpartition(".")[0]
    named = {name for name, _ in model.named_modules(remove_duplicate=False)}  # a shared module has several names
    return {site.name, owner} <= named and all(inner_name(call.node) == site.name for call in site.calls)


def _is_same(gm: fx.GraphModule, name: str, other: str) -> bool:
    """Whether a parameter has both names."""
    found = dict(gm.named_parameters(remove_duplicate=False))
    return name in found and found[name] is found[other]


def _name_in_module(weight: str, product: Product) -> str:
    """The qualified name of a site that is one of several in its module."""
    stem = weight.removesuffix("_weight").removesuffix(".weight")
    owner, _, leaf = stem.rpartition(".")
    if stem == weight:  # a module of the parameter's own name there cannot be
        stem = f"{owner}.sites.{leaf}".lstrip(".")
    return stem if product.rows is None else f"{stem}.rows_{product.rows[0]}_{product.rows[1]}"


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
