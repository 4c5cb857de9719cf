"""Find the weights that multiply data and are not sites, each with the reason.

A weight counts that has two or more dimensions. Elementwise factors and tables of positions do not multiply data in
this sense: an adapter of a linear has no place there. The norms that symbolic tracing leaves as modules count too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from ..compat.torch import OpOverload, pytree
from ..compat.torch_modules import BACKWARD_HOOKS, FORWARD_HOOKS, hooks_of
from ..graph.insertion import is_inserted
from ..graph.tensors import is_quantized
from .computed import frozen_values, is_table, largest, obstacle, parameters_behind
from .dataflow import NORMS, PLAIN_MODULES, PRODUCTS, LinearNode, op_name
from .finding import is_complex, name_of_weight
from .kinds.contraction import contraction
from .kinds.convolution import Convolution
from .kinds.embedding import Lookup
from .kinds.experts import GROUPED, Experts
from .kinds.linear import Linear
from .kinds.norm import Norm
from .kinds.site_kind import SiteKind
from .roles import FINE, infer_roles
from .site import Site

_MATRIX_PRODUCTS = PRODUCTS | {"linear", "mm", "addmm", "addbmm", "mv", "addmv", "tensordot", "inner", "bilinear"}
_LOOKUPS = {"embedding", "embedding_bag"}
_EMBEDDINGS = {"embedding", "embeddingbag"}
_GATHERS = {"index", "index_select", "gather", "getitem"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_COMPLEX = "its numbers are complex, and adapters are made of real ones"
_AS_IT_IS = "gm.get_parameter(name).requires_grad_() after rewrite trains its weights as they are"
_EXAMPLES = "with example_inputs torch.export looks into it"


@dataclass(frozen=True)
class LeftOut:
    """A weight that multiplies data and is not a site.

    Args:
        name: the name that it would have as a site.
        weight: qualified name of the parameter.
        reason: why it is not a site.
        roles: the roles of the linear that it makes. If something opaque multiplies, all roles of attentions and
            feed-forwards are possible, and given.
        kind: the kind of site that it would be.
        opaque: whether it is unknown what multiplies it.
    """

    name: str
    weight: str
    reason: str
    roles: frozenset[str] = frozenset()
    kind: SiteKind = field(default_factory=Linear)
    opaque: bool = False

    @property
    def site(self) -> Site:
        """A site of this name, kind and roles, to ask a config whether its targets include it."""
        return Site(self.name, 0, 0, self.roles, self.weight, kind=self.kind)


@dataclass(frozen=True)
class _Use:
    """A node that multiplies data with weights and is not a call of a site.

    Args:
        node: the node.
        weights: the weights, by qualified name.
        reason, kind, opaque: as in `LeftOut`.
        linear: the input and output, if they are those of a linear in a role.
    """

    node: fx.Node
    weights: Mapping[str, Tensor]
    reason: str
    kind: SiteKind = field(default_factory=Linear)
    opaque: bool = False
    linear: LinearNode | None = None


def find_left_out(gm: fx.GraphModule, sites: Iterable[Site]) -> list[LeftOut]:
    """Return the weights of `gm` that multiply data and are not sites, in order of execution.

    Args:
        gm: a graph, adapted or not.
        sites: its sites, as `find_sites` returns them.
    """
    sites = list(sites)
    frozen = frozen_values(gm.graph)
    of_sites = {node for site in sites for call in site.calls for node in (call.node, call.y)}
    nodes = (node for node in gm.graph.nodes if node not in of_sites and node not in frozen and not is_inserted(node))
    uses = [use for node in nodes if (use := _use(gm, node, frozen)) is not None]
    uses = [replace(use, reason=_COMPLEX) if _is_complex(gm, use, frozen) else use for use in uses]
    linears = [use.linear for use in uses if use.linear is not None]
    if linears:
        calls = (call for site in sites if site.kind.has_roles for call in site.calls if call.x not in frozen)
        infer_roles(gm.graph, sorted([*linears, *(LinearNode(call.x, call.y) for call in calls)], key=lambda n: n.y))
    known = {site.weight for site in sites}
    found: dict[str, LeftOut] = {}
    for use in uses:
        roles = set(FINE) if use.opaque else set()
        roles |= use.linear.reasons.keys() if use.linear is not None else set()
        for weight in [each for each in use.weights if not use.opaque or each not in known]:
            name = name_of_weight(weight)
            found.setdefault(weight, LeftOut(name, weight, use.reason, frozenset(roles), use.kind, use.opaque))
    return list(found.values())


def _use(gm: fx.GraphModule, node: fx.Node, frozen: set[fx.Node]) -> _Use | None:
    """Return how `node` multiplies data with a weight, or None if it does not."""
    if node.op == "call_module":
        return _use_of_module(gm, node)
    operands = {each: weights for each in node.all_input_nodes if each in frozen and (weights := _weights(gm, each))}
    data = [operand for operand in node.all_input_nodes if operand not in frozen]
    if not operands or not data:
        return None
    name = op_name(node)
    if name in _MATRIX_PRODUCTS:
        return _use_of_product(gm, node, operands, data)
    weights = {(main := largest(of_operand)): of_operand[main] for of_operand in operands.values()}
    if name.startswith("conv"):
        computed = next((why for operand in operands if (why := obstacle(gm, operand, node))), "")
        return _Use(node, weights, computed or f"{name} is not a kind of site", Convolution())
    if name in _LOOKUPS:
        quantized = any(map(is_quantized, weights.values()))
        why = "whose rows are stored quantized" if quantized else "with a weight that is computed, split or summed over"
        return _Use(node, weights, f"{name} {why}", Lookup())
    if name in _GATHERS and _index_is_data(node) and all(weight.dim() > 2 for weight in weights.values()):
        way_out = "experts_implementation='grouped_mm' of from_pretrained makes it a site"
        return _Use(node, weights, f"its matrices are gathered for each token; {way_out}", Experts())
    if name in GROUPED:
        return _Use(node, weights, "a product of experts with a weight that is not a parameter", Experts())
    if name in _RECURRENT:
        return _Use(node, weights, f"{name} multiplies inside one operation; {_AS_IT_IS}")
    if isinstance(node.target, (OpOverload, str)) or _is_plain(node):
        return None
    called = getattr(node.target, "__name__", str(node.target))
    weights = {path: parameter for of_operand in operands.values() for path, parameter in of_operand.items()}
    return _Use(node, weights, f"the function {called} is opaque to the capture; {_EXAMPLES}", opaque=True)


def _index_is_data(node: fx.Node) -> bool:
    """Check whether a gather reads its elements at computed indices, and is not a slice such as `table[:, :length]`."""
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves((node.args[1:], dict(node.kwargs))))


def _use_of_module(gm: fx.GraphModule, node: fx.Node) -> _Use | None:
    """Return how a module that is called as a leaf multiplies data with its weights, or None if it does not."""
    name, module = op_name(node), gm.get_submodule(str(node.target))
    weights: dict[str, Tensor] = {f"{node.target}.{path}": p for path, p in module.named_parameters() if p.dim() > 1}
    if name in NORMS and isinstance(weight := getattr(module, "weight", None), Tensor):
        reason = f"symbolic tracing does not look into norms; {_EXAMPLES}"
        return _Use(node, {f"{node.target}.weight": weight}, reason, Norm())
    if not weights or name in NORMS or isinstance(module, fx.GraphModule):
        return None
    called = type(module).__name__
    is_composed = called.startswith(("MultiheadAttention", "Transformer"))
    if is_composed or not type(module).__module__.startswith("torch.nn."):
        return _Use(node, weights, f"symbolic tracing does not look into {called}; {_EXAMPLES}", opaque=True)
    kind = Convolution() if name.startswith("conv") else Lookup() if name in _EMBEDDINGS else Linear()
    if name in _RECURRENT:
        return _Use(node, weights, f"{called} is not a kind of site; {_AS_IT_IS}")
    is_site = called in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d") and _is_hooked(module)
    return _Use(node, weights, "a hook stands on the module" if is_site else f"{called} is not a kind of site", kind)


def _use_of_product(
    gm: fx.GraphModule, node: fx.Node, operands: Mapping[fx.Node, dict[str, Tensor]], data: list[fx.Node]
) -> _Use | None:
    """Return how a matrix product multiplies data with its first frozen operand that is a weight."""
    name = op_name(node)
    # What is multiplied with looked-up or projected positions is not a weight, unless the graph says so.
    operand = next((each for each in operands if name == "linear" or not is_table(each)), None)
    if operand is None:
        return None
    main = largest(operands[operand])
    weight = operands[operand][main]
    kind: SiteKind = Experts() if weight.dim() > 2 and name in ("bmm", "matmul") else Linear()
    reason = obstacle(gm, operand, node) or _why_not_linear(gm, node, name, operand, data)
    return _Use(node, {main: weight}, reason, kind, linear=LinearNode(data[0], node) if kind.has_roles else None)


def _is_complex(gm: fx.GraphModule, use: _Use, frozen: set[fx.Node]) -> bool:
    operands = [*(operand for operand in use.node.all_input_nodes if operand in frozen), None]
    if use.opaque:  # what multiplies is not known
        return False
    return any(is_complex(gm, use.node, weight, operand) for weight in use.weights for operand in operands)


def _is_hooked(module: nn.Module) -> bool:
    kinds = [hooks_of(module, registry) for registry in (*FORWARD_HOOKS, *BACKWARD_HOOKS)]
    return any(kinds)


def _weights(gm: fx.GraphModule, operand: fx.Node) -> dict[str, Tensor]:
    """Return the parameters of two or more dimensions that a frozen value is computed from."""
    return {name: tensor for name, tensor in parameters_behind(gm, operand).items() if tensor.dim() > 1}


def _is_plain(node: fx.Node) -> bool:
    """Return whether `node` calls a function of torch or Python, whose meaning is known by its name."""
    module: Any = getattr(node.target, "__module__", None) or "torch"
    return module.partition(".")[0] in PLAIN_MODULES | {"lora_lite_fx"} and "higher_order" not in str(node.target)


def _why_not_linear(gm: fx.GraphModule, node: fx.Node, name: str, operand: fx.Node, data: list[fx.Node]) -> str:
    """Return why a product with a weight that could be read is not a site."""
    if name == "einsum":
        equation, factors, *_ = node.args if isinstance(node.args[1], (list, tuple)) else (node.args[0], node.args[1:])
        if isinstance(equation, str) and isinstance(factors, (list, tuple)) and len(factors) == 2:
            shape = (
                operand.meta["val"].shape if "val" in operand.meta else next(iter(_weights(gm, operand).values())).shape
            )
            kind = contraction(equation, factors[0] is operand, tuple(shape))
            if isinstance(kind, str):
                return kind
        return "the einsum is not of an input and a weight"
    positions = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1, "bmm": 1}
    if name in positions and len(node.args) > positions[name] and node.args[positions[name]] is not operand:
        if len(data) > 1 or name == "addmm":
            return "what is added to the product depends on the inputs"
        return "it is `weight @ x`, with the inputs in the last dimension but one"
    if name in ("linear", "addmm") and len(data) > 1:
        return "its bias depends on the inputs"
    return f"{name} with it is not a product over the last dimension of the inputs"
