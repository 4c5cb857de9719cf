"""`nn.MultiheadAttention` in symbolic tracing: linears around one function for what stands between them.

Its own `forward` looks at shapes, which a symbolic trace has none of. Here the projections become linears in the graph,
so that they can be adapted, and `attend_heads` looks at the shapes when the graph runs.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FUNCTION = inspect.signature(F.multi_head_attention_forward)


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether `module` is an attention module whose call can be traced by `attend`."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


def attend(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Record a call of `module` on proxies. Arguments and results are those of `nn.MultiheadAttention.forward`."""
    separate = None
    if module.in_proj_weight is None:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    projected = _project((query, key, value), module.embed_dim, module.in_proj_weight, module.in_proj_bias, separate)
    masks = (attn_mask, key_padding_mask, is_causal)
    options = (module.batch_first, need_weights, average_attn_weights, module.dropout, module.training)
    result = query.tracer.create_proxy(
        "call_function", attend_heads, (*projected, module.num_heads, *masks, *options), {}
    )
    y = F.linear(result[0], module.out_proj.weight, module.out_proj.bias)
    # A sequence without a batch stays as it is.
    return y.movedim(0, -2) if module.batch_first else y, result[1] if need_weights else None


def attend_in_function(tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Record a call of `F.multi_head_attention_forward` on proxies; return None for a use that is not known here."""
    bound = _FUNCTION.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if any(a[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]:
        return None
    separate = None
    if a["use_separate_proj_weight"]:
        separate = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    inputs = (a["query"], a["key"], a["value"])
    projected = _project(inputs, a["embed_dim_to_check"], a["in_proj_weight"], a["in_proj_bias"], separate)
    masks = (a["attn_mask"], a["key_padding_mask"], a["is_causal"])
    options = (False, a["need_weights"], a["average_attn_weights"], a["dropout_p"], a["training"])
    result = tracer.create_proxy("call_function", attend_heads, (*projected, a["num_heads"], *masks, *options), {})
    y = F.linear(result[0], a["out_proj_weight"], a["out_proj_bias"])
    return y, result[1] if a["need_weights"] else None


def _project(
    inputs: tuple[Any, Any, Any], size: int, weight: Any, bias: Any, separate: tuple[Any, Any, Any] | None
) -> tuple[Any, Any, Any]:
    """Return query, key and value of `size` features, with as few products as PyTorch itself makes."""
    query, key, value = inputs

    def rows(tensor: Any, start: int, stop: int) -> Any:
        return None if tensor is None else tensor[start * size : stop * size]

    if separate is not None:
        q, k, v = (
            F.linear(x, of_input, rows(bias, i, i + 1))
            for i, (x, of_input) in enumerate(zip(inputs, separate, strict=True))
        )
    elif query is key and key is value:
        y = F.linear(query, weight, bias)
        q, k, v = (y[..., i * size : (i + 1) * size] for i in range(3))
    elif key is value:
        q = F.linear(query, rows(weight, 0, 1), rows(bias, 0, 1))
        y = F.linear(key, rows(weight, 1, 3), rows(bias, 1, 3))
        k, v = y[..., :size], y[..., size:]
    else:
        q, k, v = (F.linear(x, rows(weight, i, i + 1), rows(bias, i, i + 1)) for i, x in enumerate(inputs))
    return q, k, v


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    batch_first: bool,
    need_weights: bool,
    average_attn_weights: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute what `nn.MultiheadAttention` computes between its projections.

    Args:
        q, k, v: projected query, key and value, `(batch, length, features)`, in the order of `batch_first`, or without
            a batch.
        heads: the number of heads.
        attn_mask, key_padding_mask, is_causal, batch_first, need_weights, average_attn_weights, dropout, training: as
            the module has them or takes them.

    Returns:
        The values summed by the attention, `(length, batch, features)` in this order in memory too, as PyTorch has
        them, because a dropout that follows draws in the order of memory; and the weights if they are needed.
    """
    batched = q.dim() == 3
    if batched and not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))  # (batch, heads, length, features)
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if attn_mask is None or is_causal else _additive(attn_mask, q)
    if mask is not None and mask.dim() == 3 and batched:
        mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[..., None, None, :]
        mask = padding if mask is None else mask + padding
    p = dropout if training else 0.0
    weights = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), p)
        y = weights @ v
        weights = weights.mean(-3) if average_attn_weights else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
    return y.movedim(-2, 0).contiguous().flatten(-2), weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask to be added to scores: minus infinity where a mask of truth values is true."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
