"""`parallelize`: tensor parallelism of an adapted model, whose weights become DTensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from ..adapters.placement import graph_of, placements
from ..adapters.state import adapter_tensors
from ..capture.symbolic_tracing.attention_module import attend_heads
from ..errors import AdapterError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.execution import Execution
from ..graph.divided import let_be_whole, put_borders
from ..graph.divided_dropout import DROPOUT, draws
from ..graph.insertion import insertions, surrounding
from ..graph.sharded import is_dtensor, is_sharded, is_stage
from ..graph.tensors import register_tensor, tensor_of
from ..passes import GraphPass, Pipeline, RecomputeInputs
from ..sites.finding import find_sites
from ..sites.site import Site
from .agreement import agree, broadcast_adapters, mesh_for
from .units import RunsGraphs, graphs_of

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

Model = TypeVar("Model", bound=nn.Module)

COLUMNS = ("query", "key", "value", "gate", "up")
ROWS = ("output", "down")
_DROPOUTS = (DROPOUT, torch.ops.aten.scaled_dot_product_attention.default)


def parallelize(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    columns: Sequence[str] = COLUMNS,
    rows: Sequence[str] = ROWS,
) -> Model:
    """Divide the weights of an adapted model among processes, each weight by its outputs or its inputs; in place.

    That is tensor parallelism: all processes get the same inputs, compute their part of each layer, and have the whole
    results and gradients. Weights become DTensors, whose operators torch runs on parts, so results are those of one
    process whatever is divided. `columns` and `rows` decide what is sent. With those of Megatron, the default, a
    layer's heads and inner units stay in their process.

    At a site with divided outputs B is divided and A whole, at one with divided inputs A is divided and B whole; other
    tensors of adapters are whole. Dropout draws what it would in one process. `save` is called in all processes, and
    process 0 writes whole tensors. What changes graphs comes before, and the first call of each kind of a model that
    `adapt` returned. Adapters start with the values that process 0 has.

    Args:
        model: a result of `rewrite`, `load` or `adapt`.
        mesh: of the processes, with one dimension. None for all processes, on the device of the model.
        columns: the roles of the linears that are divided by their outputs.
        rows: the roles of those that are divided by their inputs.

    Returns:
        The model.

    Raises:
        AdapterError: processes are not set up; the model has no adapters or runs no graph, or cannot be divided; or
            processes have different models. It is unchanged then, in all processes.
    """
    adapter_tensors(model)
    graphs = graphs_of(model)
    if not graphs:
        raise AdapterError(f"parallelize takes what rewrite, load or adapt returned, not {shown(model)}.")
    mesh = mesh_for(model, mesh, "parallelize")
    problem = _problem_of(model, graphs, mesh)
    graph = graph_of(model)
    assert isinstance(graph, fx.GraphModule)
    dims = {} if problem else _dims(graph, frozenset(columns), frozenset(rows))
    if not problem and not dims:
        problem = (
            f"no linear of the roles {[*columns, *rows]} has a weight that can be divided; quantized ones are computed."
            " The way out: other roles; or for a quantized base llfx.shard(model), which divides what is stored."
        )
    from torch.distributed.tensor import Replicate

    agree(model, mesh, problem, "parallelize")
    broadcast_adapters(model, mesh)
    places = _places(graph, dims)
    known: dict[int, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) not in known:
            known[id(tensor)] = _divided(tensor, mesh, places.get(name, Replicate()))
        register_tensor(model, name, known[id(tensor)])
    for gm in graphs:
        gm.execution = _divided_execution(gm.execution, dims, mesh)
        gm.drop_derived()
    if isinstance(model, RunsGraphs):
        model.bind_graphs()
    return model


@dataclass(frozen=True)
class SumAtSites(GraphPass):
    """Let the result of each linear that is divided by inputs be whole, and the gradient of each other one's input.

    So a process sends what Megatron's rules say: two sums of activations per layer and pass. Left alone, DTensors carry
    sums that no process has to the next operation that cannot take them, and choose there anew what costs least: they
    may sum one value several times, or gather weights. Safe because a value and its sum over the processes are one
    DTensor in two forms.

    Args:
        dims: the dimension of `W (d_out, d_in)` that is divided, by the name of the site.
    """

    dims: Mapping[str, int]

    def run(self, gm: fx.GraphModule) -> int:
        adapters = insertions(gm.graph)
        summed: dict[fx.Node, None] = {}  # one sum for siblings, which read one input
        for site in find_sites(gm):
            dim = self.dims.get(site.name)
            for call in site.calls if dim is not None else ():
                _, x, y = surrounding([each for each in adapters if each.site == site.name], call.x, call.y)
                summed[y if dim else x] = None
        for node in summed:
            let_be_whole(gm.graph, node)
        return len(summed)


def _divided_execution(execution: Execution | None, dims: Mapping[str, int], mesh: DeviceMesh) -> Execution:
    assert execution is not None
    # Without a check, which takes whole tensors. Operations on DTensors save what autograd saves, dropout its mask.
    passes = [each for each in execution.passes if not isinstance(each, RecomputeInputs)]
    pipeline = Pipeline((SumAtSites(dims), *passes))
    return replace(execution, passes=pipeline, finish=functools.partial(put_borders, mesh=mesh))


def _divided(tensor: Tensor, mesh: DeviceMesh, place: Placement) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Each process takes its part of its own tensor, because all have the same.
    part = distribute_tensor(tensor.detach(), mesh, [place], src_data_rank=None)
    if not isinstance(tensor, nn.Parameter):
        return part
    parameter = nn.Parameter(part, requires_grad=tensor.requires_grad)
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(_like_the_parameter)
    return parameter


def _like_the_parameter(parameter: Tensor) -> None:
    """Divide the gradient as the parameter is: until then it may be a sum that no process has."""
    assert is_dtensor(parameter)
    if is_dtensor(parameter.grad):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def _dims(gm: fx.GraphModule, columns: frozenset[str], rows: frozenset[str]) -> dict[str, int]:
    """Return the dimension of `W (d_out, d_in)` that is divided, by site."""
    dims = {}
    for site in find_sites(gm):
        dim = 0 if site.roles & columns else 1 if site.roles & rows else None
        if dim is not None and _can_be_divided(gm, site):
            dims[site.name] = dim
    return dims


def _places(gm: fx.GraphModule, dims: Mapping[str, int]) -> dict[str, Placement]:
    """Return how each tensor that is divided is, by qualified name."""
    from torch.distributed.tensor import Shard

    found: dict[str, Placement] = {}
    for site in find_sites(gm) if dims else ():
        dim = dims.get(site.name)
        if dim is not None:
            found[site.weight] = Shard(1 - dim if site.transposed else dim)
        if dim == 0 and site.bias is not None and site.bias_rows is None:
            found[site.bias] = Shard(0)
    for placement in placements(gm):
        divided = {0: "lora_B", 1: "lora_A"}.get(dims.get(placement.site, -1))
        for name, qualified in placement.tensors.items():
            if placement.variant.slots is None and name == divided:
                found[qualified] = Shard(dims[placement.site])
    return found


def _can_be_divided(gm: fx.GraphModule, site: Site) -> bool:
    is_plain = site.is_plain_linear and site.computed_weight is None
    return is_plain and type(tensor_of(gm, site.weight)) is nn.Parameter and tensor_of(gm, site.weight).dim() == 2


def _problem_of(model: nn.Module, graphs: Sequence[AdaptedGraphModule], mesh: DeviceMesh) -> str:
    """Return the reason why the model cannot be divided, with the way out; empty if it can."""
    if is_sharded(model) or is_stage(model):
        return "it is divided already, by fully_shard, parallelize or split."
    if mesh.ndim != 1:
        return f"the mesh has {mesh.ndim} dimensions. The way out: mesh[name], one of them."
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return (
                f"{name} is stored as a {type(parameter).__name__}, which DTensors cannot hold. The way out:"
                " llfx.shard(model), which divides quantized weights; or a base that is not quantized."
            )
    return next((problem for gm in graphs if (problem := _problem_of_graph(gm))), "")


def _problem_of_graph(gm: AdaptedGraphModule) -> str:
    assert gm.execution is not None
    if gm.execution.memory != "fast":
        return (
            "its memory is planned, which measures layers by their whole tensors. The way out:"
            " plan_memory(model, 'fast'), and checkpoint_layers where that is too much."
        )
    for node in gm.flat_graph.nodes:
        if node.target is attend_heads and node.args[10]:
            return "nn.MultiheadAttention has dropout, whose masks would differ by process. The way out: dropout of 0."
        if draws(node) and node.target not in _DROPOUTS:
            return (
                f"{node.name} ({node.target}) draws random numbers, which would differ by process: dropout alone is"
                " drawn as one process would. The way out: switch it off."
            )
    return ""
