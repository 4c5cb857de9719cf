"""`bake`: a graph with constants for what depends on parameters alone, which runtimes compute in each call."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.copies import Draft
from ..graph.insertion import forget, is_inserted, place_of
from ..graph.parameter_work import first_input, parameter_work
from ..graph.tensors import attribute_of, has_attribute, keep_registration, outside_inference_mode, register_tensor
from ..graph.writes import written_attributes
from ..passes import AssociateProducts, FoldScaleIntoAddition, HoistParameterWork, LeaveOutDropout, Pipeline
from .served_graph import evaluated_graph, graph_to_serve

_BAKED = "baked_"
"""The names of constants begin with this, in the module of their site."""


def is_baked(name: str) -> bool:
    """Tell whether a tensor of this name is a constant of `bake`."""
    return re.fullmatch(rf"{_BAKED}\d+", name.rpartition(".")[2]) is not None


@outside_inference_mode()
def bake(model: nn.Module, *, whole_updates: bool = False) -> fx.GraphModule:
    """Return a graph in which the norms, rotations and folded factors of the adapters that act are constants.

    A graph computes them from the parameters, in each call outside of `llfx.frozen`. A runtime that takes an export has
    no such scope, and some lack the operators that they need, as those that solve equations. The result has constants
    there; it computes the same in evaluation mode, and no longer has adapters to train, switch or swap.

    Safe because these values depend on parameters and frozen tensors alone, draw no random numbers and write nothing.

    Args:
        model: a result of `rewrite`, `load` or `adapt`. It is not changed. Adapters that `active` leaves out are left
            out, and coefficients of `scaled` are constants.
        whole_updates: make constants of values that are much larger than the adapter's tensors too, such as the update
            `(d_out, d_in)` of LoHa. By default these are computed in each call, because kept for every site they
            would be a second model.

    Returns:
        A graph module, in evaluation mode, that is called like the model. It shares the frozen weights.

    Raises:
        AdapterError: `model` is not a graph or an adapted model, or a coefficient is not one number.
    """
    gm = graph_to_serve(model)
    draft = Draft(gm, evaluated_graph(gm, "bake"))
    keep_registration(gm, draft)
    Pipeline((LeaveOutDropout(),)).run(draft)
    make_constants(draft, whole_updates)
    for node in filter(is_inserted, draft.graph.nodes):
        forget(node)
    assert gm.execution is not None
    baked = AdaptedGraphModule(draft, draft.graph, gm.execution)  # has only the tensors that the graph reads
    keep_registration(draft, baked)
    baked.base_buffers = gm.base_buffers
    return baked.eval()


def make_constants(gm: fx.GraphModule, whole_updates: bool) -> None:
    """Make constants of the parameter work of adapters in a graph in evaluation mode, see `bake`."""
    Pipeline((AssociateProducts(), FoldScaleIntoAddition())).run(gm)
    if whole_updates:
        work = parameter_work(gm)
    else:
        HoistParameterWork().run(gm)
        first = first_input(gm.graph)
        work = [node for node in parameter_work(gm) if node < first]
    _make_constants(gm, work)


@torch.no_grad()
def _make_constants(gm: fx.GraphModule, work: list[fx.Node]) -> None:
    """Replace the values of nodes that others read by buffers that hold them."""
    work = _of_unwritten_tensors(gm, work)
    members, values = set(work), dict[fx.Node, Any]()

    def value_of(node: fx.Node) -> Any:
        return attribute_of(gm, str(node.target)) if node.op == "get_attr" else values[node]

    for node in work:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    count = 0
    for node, value in values.items():
        if members.issuperset(node.users):
            continue
        if not isinstance(value, Tensor):
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in members)
            continue
        while has_attribute(gm, name := f"{place_of(node)}.{_BAKED}{count}"):
            count += 1
        register_tensor(gm, name, value.detach().clone(memory_format=torch.contiguous_format))
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        constant.meta = {"val": node.meta.get("val")}
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in members)
    for node in reversed(work):
        if not node.users:
            gm.graph.erase_node(node)


def _of_unwritten_tensors(gm: fx.GraphModule, work: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes that depend on no tensor that calls write to, because its values change."""
    written, kept = set(written_attributes(gm)), set[fx.Node]()
    for node in work:
        reads = [node, *node.all_input_nodes]
        if all(read.target not in written if read.op == "get_attr" else read in kept or read is node for read in reads):
            kept.add(node)
    return [node for node in work if node in kept]
