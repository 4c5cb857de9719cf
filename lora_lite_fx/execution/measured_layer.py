"""Measure what a layer saves for the backward pass, and what it costs to compute each value again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.torch import OpOverload, is_transform
from ..graph.insertion import inner_name
from ..graph.queries import argument_of, is_deterministic, operation_name
from ..graph.regions import closes_region, opens_region
from ..graph.writes import written_operands
from .cut_program import call
from .memory_plan import Measured, MemoryPlan

aten = torch.ops.aten


def obstacle(graph: fx.Graph) -> str:
    """Return why no value of a layer may be computed again; empty if some may."""
    for node in graph.nodes:
        if opens_region(node) or closes_region(node) or is_transform(node):
            return "the layer switches autograd or autocast, or transforms functions"
        if node.target is call:
            return f"it calls the module {node.args[0]}, which may change its own state"
        if written_operands(node):
            return f"{operation_name(node)} overwrites a tensor"
        if node.op.startswith("call_") and not _is_without_effects(node):
            return f"{operation_name(node)} may have effects that nothing tells of"
    return ""


def _is_without_effects(node: fx.Node) -> bool:
    """Return whether a call is known to write to no tensor. An operator of torch says so itself."""
    target = node.target
    if isinstance(target, OpOverload):
        return True
    module, name = getattr(target, "__module__", ""), operation_name(node)
    if module == "_operator":
        return name not in ("setitem", "delitem") and not (name[0] == "i" and hasattr(operator, name[1:]))  # iadd
    return module == "math" or module.startswith("lora_lite_fx.ops") or (module == "torch" and name.startswith("sym_"))


def _is_repeatable(node: fx.Node) -> bool:
    if node.target is _ATTENTION:
        dropout = argument_of(node, "dropout_p")
        return isinstance(dropout, float) and dropout == 0.0
    # Operators of others need not say that they draw random numbers.
    is_foreign = isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims")
    return is_deterministic(node) and not is_foreign


_OPERATIONS_PER_BYTE = {"cpu": 8}
"""How many operations a processor of this kind does while it moves a byte; others, such as GPUs, do more.

Measured: 5 on an AMD EPYC, 7 to 13 on an Intel Xeon with AVX-512.
"""
_OF_OTHERS = 100
_ATTENTION = aten.scaled_dot_product_attention.default


class Recorder(fx.Interpreter):
    """Runs the graph of a layer node by node, and records values and operations.

    Args:
        graph: of the layer, whose placeholders are all that it reads.
        own: the number of placeholders that are values of the module, which exist anyway. Those after them are inputs.
    """

    def __init__(self, graph: fx.Graph, own: int) -> None:
        super().__init__(fx.GraphModule(nn.Module(), graph), garbage_collect_values=False)
        self.originals = dict(zip(self.graph.nodes, graph.nodes, strict=True))  # the module has copies of the nodes
        *self.nodes, self.end = graph.nodes
        self.inputs = [node for node in self.nodes if node.op == "placeholder"][own:]
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        from torch.utils.flop_counter import FlopCounterMode

        self.counter = FlopCounterMode(display=False)

    def run(self, *operands: Any) -> Any:  # type: ignore[override]
        """Return the results for the values of the placeholders."""
        with self.counter:
            return super().run(*operands, enable_io_processing=False)

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        before = self.counter.get_total_flops()
        value = super().run_node(node)
        flops = self.counter.get_total_flops() - before
        if node.target is _ATTENTION and not flops:  # as of the kernel for CPUs, which torch counts nothing of
            query, key, value_rows = self.fetch_args_kwargs_from_env(node)[0][:3]
            flops = 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value_rows.shape[-1])
        original = self.originals[node]
        self.values[original], self.flops[original] = value, flops
        return value

    def measured(self, saved: Sequence[Tensor]) -> Measured:
        """Return what was measured.

        Args:
            saved: the tensors that autograd saved.
        """
        made_by: dict[int, fx.Node] = {}  # by the address of the memory; all values are there, so no two have one
        home: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if isinstance(value := self.values[node], Tensor):
                home[node] = made_by.setdefault(address(value), node)
        returned = {home.get(node) for node in self.end.all_input_nodes}
        result = self.values[self.end.all_input_nodes[0]]
        of_layer = {node for node in self.inputs if _is_hidden_state(self.values[node], result)}
        of_layer |= {node for node in home.values() if node.op != "placeholder" and node not in returned}
        kept: dict[fx.Node, int] = {}
        inside: dict[int, int] = {}
        for tensor in saved:
            maker = made_by.get(address(tensor))
            if maker is None:
                inside[address(tensor)] = _size(tensor)
            elif maker in of_layer:
                kept[maker] = _size(tensor)
        return Measured(
            saved=kept,
            inside=sum(inside.values()),
            cost={node: self._cost(node, home) for node in self.nodes if self._has_tensors(node)},
            home=home,
            given={node: _size(self.values[node]) for node in self.inputs if node in of_layer and node not in kept},
            repeatable={node for node in self.nodes if _is_repeatable(node)},
            tokens=_rows(result),
        )

    def _has_tensors(self, node: fx.Node) -> bool:
        return node.op != "placeholder" and isinstance(self.values[node], (Tensor, tuple, list))

    def _cost(self, node: fx.Node, home: dict[fx.Node, fx.Node]) -> float:
        """Return the operations of a node, and the time in which it reads and writes memory; a view does neither."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_products(node.args[0]):
            return self._part(node) * self._whole_cost(node.args[0])
        if _is_products(node) or (node in home and home[node] is not node):
            return 0.0
        return self._whole_cost(node)

    def _part(self, node: fx.Node) -> float:
        """Return the part that one result has of several that can be computed without each other."""
        products, place = node.args
        assert isinstance(products, fx.Node)
        values = self.values[products]
        return float(values[place].nbytes / sum(value.nbytes for value in values))

    def _whole_cost(self, node: fx.Node) -> float:
        value = self.values[node]
        moved = [
            *(self.values[read] for read in node.all_input_nodes),
            *(value if isinstance(value, tuple) else [value]),
        ]
        size = sum(tensor.nbytes for tensor in moved if isinstance(tensor, Tensor))
        device = next((tensor.device.type for tensor in moved if isinstance(tensor, Tensor)), "cpu")
        return self.flops[node] + size * _OPERATIONS_PER_BYTE.get(device, _OF_OTHERS)


def _is_products(node: fx.Node) -> bool:
    return getattr(node.target, "results_are_apart", False)


def address(tensor: Tensor) -> int:
    """Return the address of the memory of a tensor, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _is_hidden_state(value: Any, result: Any) -> bool:
    """Return whether an input is a layer's own. Others, such as masks and positions, are shared with other layers."""
    return isinstance(value, Tensor) and (
        value.requires_grad or (value.is_floating_point() and value.shape == result.shape)
    )


def _rows(value: Any) -> int:
    return max(value[..., 0].numel(), 1) if isinstance(value, Tensor) and value.dim() else 1


def plan_of(measured: Measured, dropped: Sequence[fx.Node]) -> MemoryPlan:
    """Return the plan that drops these values."""
    fast, planned = measured.outcome(()), measured.outcome(dropped)
    assert fast is not None
    assert planned is not None
    kept: dict[str, float] = {}
    again: dict[str, float] = {}
    for node, size in measured.saved.items():
        rows = again if node in dropped else kept
        rows[_label(node)] = rows.get(_label(node), 0) + size / measured.tokens
    sources, _ = measured.repeated(dropped) or ([], [])
    for held in {measured.home[source] for source in sources if source in measured.home} & measured.given.keys():
        kept[_label(held)] = kept.get(_label(held), 0) + measured.given[held] / measured.tokens
    if measured.inside:
        kept["inside operations"] = measured.inside / measured.tokens
    return MemoryPlan(
        kept=kept,
        dropped=again,
        fast=fast[0] / measured.tokens,
        bytes_per_token=planned[0] / measured.tokens,
        cost=planned[1] / measured.step if measured.step else 0.0,
    )


def _label(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the input of the layer"
    module = inner_name(node)
    return node.name if module is None else f"{module}: {operation_name(node)}"
