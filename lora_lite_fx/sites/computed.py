"""Weights and biases that a graph computes from tensors of the module, as `weight_norm` and BEiT's joined biases.

Such a tensor is a node and has no name. Whoever needs its value computes it from what the tensors hold then: an adapter
copies the computation into the graph, and `evaluate` runs it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import OpOverload
from ..errors import AdapterError
from ..graph.insertion import is_inserted
from ..graph.queries import is_deterministic, reads_tensor
from ..graph.regions import closes_region, opens_region
from ..graph.sharded import whole
from ..graph.subgraph import extract
from ..graph.tensors import attribute_of, has_attribute, tensor_of
from ..graph.walk import ancestors
from ..graph.writes import written, written_buffers
from ..storage.storages import STORAGES
from .dataflow import LOOKUPS, PLAIN_MODULES, PRODUCTS, op_name

_LINEARS = frozenset({"linear", "addmm", "mm"})
_RANDOM = frozenset({"bernoulli", "multinomial", "normal", "poisson", "rrelu", "gumbel_softmax"})


@dataclass(frozen=True)
class Computation:
    """How a weight or bias is computed from tensors of a module.

    Args:
        graph: has no inputs, and returns the tensor.
        tensors: qualified names of the tensors that it reads, in the order of the graph.
    """

    graph: fx.Graph
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Computation:
        """Return the computation of `node`, which depends on no input of its graph."""
        graph = extract((), (node,))
        return cls(graph, tuple(str(read.target) for read in graph.find_nodes(op="get_attr", sort=True)))

    def inside(self, path: str) -> Computation | None:
        """Return the same computation with names as the module at `path` has them, or None if it reads others."""
        prefix = f"{path}." if path else ""
        if not all(name.startswith(prefix) for name in self.tensors):
            return None
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for read in graph.find_nodes(op="get_attr"):
            read.target = str(read.target).removeprefix(prefix)
        return Computation(graph, tuple(name.removeprefix(prefix) for name in self.tensors))

    @torch.no_grad()
    def run(self, module: nn.Module) -> Tensor:
        """Return the tensor, computed from the tensors of these names that `module` has now, gathered if need be."""
        return self.value(module).detach()

    def value(self, module: nn.Module) -> Tensor:
        """Return the same with its gradient, which the tensors get that it is computed from.

        Raises:
            AdapterError: `module` no longer has one of the tensors.
        """
        gone = [name for name in self.tensors if _found(module, name) is None]
        if gone:
            raise AdapterError(
                f"{gone[0]!r} was taken away after the graph was captured, and the graph computes with it. The way out:"
                " put it back, or capture the changed model."
            )
        (value,) = _OfWholeTensors(module, garbage_collect_values=False, graph=self.graph).run()
        assert isinstance(value, Tensor)
        return value

    @property
    def text(self) -> str:
        """The computation as text: two nodes with equal texts compute the same."""
        numbers = {node: f"%{number}" for number, node in enumerate(self.graph.nodes)}
        return "\n".join(
            f"{node.target}{fx.map_arg((node.args, node.kwargs), numbers.__getitem__)}" for node in self.graph.nodes
        )


def _found(module: nn.Module, name: str) -> Any:
    return attribute_of(module, name) if has_attribute(module, name) else None


class _OfWholeTensors(fx.Interpreter):
    """Gathers tensors of which each process has a part, because operations of other libraries take whole ones."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return whole(value) if isinstance(value, Tensor) else value


def frozen_values(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of the frozen model that depend on no input of the graph."""
    frozen: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op in ("call_function", "call_method", "call_module") and frozen.issuperset(
            node.all_input_nodes
        )
        if not is_inserted(node) and (computed or node.op == "get_attr"):
            frozen.add(node)
    return frozen


def computes_the_same(first: fx.Node, second: fx.Node) -> bool:
    """Check whether two nodes that depend on no input are computed of the same tensors by the same operations."""
    if (first.op, first.target) != (second.op, second.target):
        return False
    plain, other = (fx.map_arg((node.args, node.kwargs), lambda operand: None) for node in (first, second))
    operands = list(zip(first.all_input_nodes, second.all_input_nodes, strict=False))
    as_many = len(operands) == len(first.all_input_nodes) == len(second.all_input_nodes)
    return bool(plain == other) and as_many and all(computes_the_same(*pair) for pair in operands)


def parameters_behind(gm: fx.GraphModule, node: fx.Node) -> dict[str, Tensor]:
    """Return the parameters that a frozen value is computed from, by qualified name."""
    found: dict[str, Tensor] = {}
    for read in sorted(ancestors([node])):
        if read.op == "call_module":
            of_module = gm.get_submodule(str(read.target)).named_parameters()
            found |= {f"{read.target}.{name}": parameter for name, parameter in of_module}
        elif reads_tensor(gm, read) and isinstance(tensor := tensor_of(gm, str(read.target)), nn.Parameter):
            found[str(read.target)] = tensor
    return found


def largest(parameters: dict[str, Tensor]) -> str:
    """Return the name of the parameter with the most elements, the first of equal ones; empty if there is none."""
    return max(parameters, key=lambda name: parameters[name].numel(), default="")


def name_and_shape(gm: fx.GraphModule, node: fx.Node, dim: int, product: fx.Node) -> tuple[str, Sequence[int]] | None:
    """Return the name and the shape of a frozen value as a weight or bias, or None if it cannot be one.

    Args:
        gm: the graph module.
        node: a frozen value.
        dim: the number of dimensions: one for a bias, more for a weight.
        product: the node that reads it.
    """
    if "val" in node.meta and getattr(node.meta["val"], "ndim", dim) != dim:
        return None
    parameters = parameters_behind(gm, node)
    if dim > 1:
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        if not parameters or (op_name(product) in PRODUCTS | {"mm"} and is_table(node)):
            return None
    if obstacle(gm, node, product):
        return None
    computation = Computation.of(node)
    shape = node.meta["val"].shape if "val" in node.meta else computation.run(gm).shape
    return (largest(parameters) or next(iter(computation.tensors), ""), shape) if len(shape) == dim else None


def is_table(node: fx.Node) -> bool:
    """Return whether a frozen value holds looked-up rows or products, as positions do that queries are multiplied with.

    A weight of a linear may be computed so too, but what says `linear` says that it is a weight.
    """
    return any(op_name(behind) in LOOKUPS | PRODUCTS | _LINEARS for behind in ancestors([node]))


def obstacle(gm: fx.GraphModule, node: fx.Node, product: fx.Node) -> str:
    """Return why a frozen value cannot be computed a second time for an adapter at `product`; empty if it can."""
    nodes = sorted(ancestors([node]))
    buffers = set(written_buffers(gm))
    for behind in nodes:
        if behind.op == "get_attr" and not reads_tensor(gm, behind):
            return "it depends on the mode of the model"
        if behind.op == "get_attr" and behind.target in buffers:
            return f"it is computed from the buffer {behind.target}, which the model changes"
        if "quantize" in op_name(behind) and not _reads_storage(behind):
            # a quantization by others, perhaps of a weight that has adapters already
            return "it is quantized"
        if behind.op == "call_module":
            return f"symbolic tracing does not look into the module {behind.target} that computes it"
        if behind.op != "get_attr" and not _repeats(gm, behind):
            return f"it is computed by {op_name(behind)}, which is random or changes a tensor"
    if not _in_one_region([behind for behind in nodes if behind.op != "get_attr"], product):
        return "it is computed in another mode of autograd or autocast"
    return ""


def _reads_storage(node: fx.Node) -> bool:
    """Return whether `node` is an operator that reads a quantized weight, see `storage`."""
    namespace = node.target.namespace if isinstance(node.target, OpOverload) else ""
    return op_name(node).startswith("dequantize") and any(storage.has(namespace) for storage in STORAGES)


def _in_one_region(nodes: list[fx.Node], last: fx.Node) -> bool:
    """Return whether `nodes`, in graph order, and `last` run in the same mode of autograd and autocast."""
    depth, node = 0, nodes[0] if nodes else last
    while node is not last:
        depth += opens_region(node) - closes_region(node)
        if depth < 0 or (depth and node in nodes):
            return False
        node = node.next
    return depth == 0


def _repeats(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether `node` computes the same from the same operands, and changes nothing."""
    if isinstance(node.target, OpOverload) or node.target is operator.getitem:
        return is_deterministic(node) and not written(gm, node)
    name = op_name(node)
    module = getattr(node.target, "__module__", None) or "torch"
    known = node.op == "call_method" or module.partition(".")[0] in PLAIN_MODULES
    random = name in _RANDOM or "dropout" in name or name.startswith("rand")
    return known and not random and not written(gm, node)
