"""Run a graph whose parameters are divided as DTensors: its inputs become whole DTensors, its results whole tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compat.torch import UNSAFE_VIEW
from .divided_calls import begin_together
from .divided_dropout import attention_with_dropout, let_dropouts_agree
from .insertion import forget, is_inserted
from .queries import reads_tensor
from .sharded import is_dtensor, whole
from .tensors import tensor_of

_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, UNSAFE_VIEW)
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def put_borders(gm: nn.Module, graph: fx.Graph, mesh: DeviceMesh) -> None:
    """Let values that depend on no DTensor become one where they meet those that do, and results whole tensors again.

    Safe because every process computes the same outside of what depends on DTensors; and inside torch's rules for
    DTensors say of each operator which parts its result has, so that the result is the one of whole tensors.

    Args:
        gm: has the tensors.
        graph: changed in place.
        mesh: of the processes.
    """
    drawing, may_draw = let_dropouts_agree(graph)
    begin_together(graph, mesh, may_draw)
    divided: set[fx.Node] = set()
    for node in graph.nodes:
        reads_part = _is_divided(gm, node) or not divided.isdisjoint(node.all_input_nodes)
        if reads_part and node.op != "output" and not _is_number(node):
            divided.add(node)
    replicated = replicated_on(mesh)
    made: dict[fx.Node, fx.Node] = {}
    for node in sorted(divided):
        for read in node.all_input_nodes:
            if read not in divided and read not in made and not _is_number(read):
                place = read
                while place.op in ("placeholder", "get_attr") and place.next.op in ("placeholder", "get_attr"):
                    place = place.next
                with graph.inserting_after(place):
                    made[read] = graph.call_function(replicated, (read,))
                made[read].meta = dict(read.meta)
        node.args = fx.node.map_arg(node.args, lambda read: made.get(read, read))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda read: made.get(read, read))
        if node.target in _RESHAPES and _parts_heads(node, mesh.size()):
            divided.add(_let_be_whole_around(graph, node))
        if node.target is _ATTENTION and (mesh.device_type == "cpu" or node in drawing):
            node.target = attention_of_divided_heads
    output = graph.output_node()
    with graph.inserting_before(output):
        results = {node: graph.call_function(whole, (node,)) for node in output.all_input_nodes if node in divided}
    for node, result in results.items():
        result.meta["val"] = node.meta.get("val")
    output.args = fx.node.map_arg(output.args, lambda node: results.get(node, node))


def _parts_heads(node: fx.Node, processes: int) -> bool:
    """Check whether a reshape makes heads of a dimension, or one of them, that the processes cannot divide evenly."""
    shapes = [getattr(each.meta.get("val"), "shape", ()) for each in (node, node.all_input_nodes[0])]
    few, many = ([size for size in shape if isinstance(size, int)] for shape in sorted(shapes, key=len))
    pairs = itertools.pairwise(many)
    return any(heads % processes and heads * width in few and heads * width not in many for heads, width in pairs)


def let_be_whole(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """Let what reads `value` read it as a DTensor that all processes have whole, its gradient too; return that node."""
    with graph.inserting_after(value):
        result = graph.call_function(made_whole, (value,))
    result.meta = dict(value.meta)
    if is_inserted(result):
        forget(result)  # of the adapter that computes the value
    value.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    return result


def _let_be_whole_around(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Let a value and its gradient be whole around `node`, as no process can have a part of a head; return it after."""
    read, *others = node.args
    with graph.inserting_before(node):
        whole_read = graph.call_function(made_whole, (read,))
    whole_read.meta = dict(node.meta)
    node.args = (whole_read, *others)
    return let_be_whole(graph, node)


def made_whole(value: Tensor) -> Tensor:
    """Return a DTensor that all processes have whole; its gradient is whole too."""
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate

    return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_divided(gm: nn.Module, node: fx.Node) -> bool:
    return reads_tensor(gm, node) and is_dtensor(tensor_of(gm, str(node.target)))


def replicated_on(mesh: DeviceMesh) -> Callable[[Any], Any]:
    """Return a function that makes a tensor, the same in all processes of `mesh`, a DTensor that all have whole."""
    from torch.distributed.tensor import DTensor, Replicate

    places = [Replicate()] * mesh.ndim

    def replicated(value: Any) -> Any:
        is_plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
        return DTensor.from_local(value, mesh, places, run_check=False) if is_plain else value

    return replicated


def attention_of_divided_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Compute attention by matrix products, because DTensors have no rule for the fused operator of CPUs.

    Nor do they drop the same as one process in those of other devices. Masks are added as numbers: torch would make
    plain tensors of its own for others.
    """
    options = dict(zip(("dropout_p", "is_causal"), args, strict=False)) | kwargs
    dropout_p, is_causal = options.pop("dropout_p", 0.0), options.pop("is_causal", False)
    if not dropout_p and query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **options)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        allowed = whole(attn_mask)
        zeros = torch.zeros(allowed.shape, dtype=query.dtype, device=allowed.device)
        attn_mask = zeros.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and is_dtensor(query):
        attn_mask = replicated_on(query.device_mesh)(attn_mask)
    if dropout_p:
        return attention_with_dropout(query, key, value, attn_mask, dropout_p, options.get("scale"))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
