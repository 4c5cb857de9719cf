"""Dropout in graphs whose values are divided as DTensors: each process drops what one process would drop.

DTensors draw by the generator of each process alone on CPUs, and in fused attention on other devices too: processes
would then drop other elements of a value that all have, or the same ones of their parts. So all draw the mask of the
whole value, from generators in one state, and each applies its part of the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compat.torch import OpOverload
from .modes import begin_with, is_flag
from .queries import argument_of
from .sharded import is_dtensor
from .walk import ancestors

DROPOUT = torch.ops.aten.dropout.default


def draws(node: fx.Node) -> bool:
    """Check whether `node` draws random numbers: an operator that can, but for dropout of zero."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return bool(argument_of(node, "p", "dropout_p") != 0)


def let_dropouts_agree(graph: fx.Graph) -> tuple[set[fx.Node], fx.Node | bool]:
    """Let dropouts draw as in one process, where the generators of all processes have one state.

    Args:
        graph: changed in place. Attention that drops is left to `attention_with_dropout`.

    Returns:
        The nodes that draw; and whether a call draws, or the node that says so by the modes.
    """
    drawing = [node for node in graph.nodes if draws(node)]
    flags = [argument_of(node, "train", "dropout_p") for node in drawing]
    for node in drawing:
        if node.target is DROPOUT:
            node.target = dropout_of_parts
    if not all(isinstance(flag, fx.Node) or not flag for flag in flags):
        return set(drawing), True
    modes = sorted({node for node in ancestors(flags) if is_flag(node)})
    if not modes:
        return set(drawing), bool(drawing)
    with graph.inserting_after(begin_with(graph, modes)):
        return set(drawing), graph.call_function(number_of_modes, tuple(modes))


def number_of_modes(*flags: bool) -> int:
    """Return a number that is another one where other parts are in training mode; 0 if none is."""
    return 1 + hash(flags) % 2**62 if any(flags) else 0


def dropout_of_parts(x: Tensor, p: float, training: bool) -> Tensor:
    """Compute dropout; of a DTensor by this process's part of the mask that one process would draw."""
    if not is_dtensor(x):
        return F.dropout(x, p, training)
    if not training:
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not all(type(place) is Shard for place in x.placements):
        x = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)  # as a sum over processes has no elements yet
    # In the order of memory that the whole value has, because generators draw in that order.
    ones = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(1)
    factors = DTensor.from_local(F.dropout(ones, p), x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)
    return x * factors.redistribute(placements=x.placements)


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """Compute attention by matrix products, and drop weights as one process would.

    Args:
        query: `(..., heads, length, size)`.
        key, value: of as many heads, or of fewer that several heads of queries share.
        attn_mask: is added to the scores, as numbers.
        dropout_p: the probability.
        scale: of the scores; None for that of the size.
    """
    shared = query.shape[-3] // key.shape[-3]
    scores_scale = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if shared > 1:
        key, value = (_repeated(each, shared) for each in (key, value))
    scores = (query * scores_scale) @ (key * scores_scale).transpose(-2, -1)
    if attn_mask is None:
        return dropout_of_parts(scores.softmax(dim=-1), dropout_p, True) @ value
    blocked = (attn_mask.detach() == -math.inf).all(-1, keepdim=True)  # rows of padding: softmax has no value for them
    weights = (scores + attn_mask.masked_fill(blocked, 0)).softmax(dim=-1).masked_fill(blocked, 0)
    return dropout_of_parts(weights, dropout_p, True) @ value


def _repeated(heads: Tensor, times: int) -> Tensor:
    expanded = heads.unsqueeze(-3).expand(*heads.shape[:-2], times, *heads.shape[-2:])
    return expanded.flatten(-4, -3)
