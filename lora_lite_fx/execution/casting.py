"""What a cast of an adapted graph's tensors, such as `gm.to(torch.bfloat16)`, means for the graph itself.

A graph that holds no dtypes computes in those of its tensors, so that only the recorded dtypes of its values change.
Most graphs that are exported hold some: `x.to(y.dtype)` in a model becomes a cast to the dtype that `y` had at capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..errors import AdapterError

_META = torch.device("meta")


def follow_cast(gm: fx.GraphModule, fn: Callable[[Tensor], Tensor]) -> None:
    """Let the graph follow a cast of its tensors, before it happens.

    Args:
        gm: the graph; the recorded dtypes of its values change if the cast changes them.
        fn: what is to be applied to each tensor, as `nn.Module._apply` gets it.

    Raises:
        AdapterError: `fn` changes a dtype, and the graph holds dtypes, which would stay. Nothing is changed.
    """
    casts = _casts(gm, fn)
    if not casts:
        return
    for graph in [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in graph.nodes:
            held: list[object] = []
            map_aggregate((node.args, node.kwargs), held.append)
            if any(isinstance(item, torch.dtype) and item.is_floating_point for item in held):
                change = ", ".join(f"{_name(old)} to {_name(new)}" for old, new in casts.items())
                raise AdapterError(
                    f"A captured graph cannot be cast from {change}: it holds the dtypes of its capture, at"
                    f" {node.name!r} for one. Nothing is changed. The way out: cast the model, then rewrite or load;"
                    " dtype=... of a config sets that of the adapters alone."
                )
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = map_aggregate(node.meta["val"], lambda value: _cast(value, casts))


def follow_data(gm: fx.GraphModule, fn: Callable[[Tensor], Tensor]) -> None:
    """Let a graph that was captured on the device "meta" be one of the device where its tensors get memory.

    Args:
        gm: the graph; the devices that it holds change.
        fn: what is to be applied to each tensor, as `nn.Module._apply` gets it.
    """
    if not any(parameter.is_meta for parameter in gm.parameters()):
        return
    device = _META
    with suppress(Exception), torch.no_grad():
        device = fn(torch.empty(0, device=_META)).device
    if device == _META:
        return
    for part in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in part.graph.nodes:
            node.args = map_aggregate(node.args, lambda item: device if item == _META else item)
            node.kwargs = map_aggregate(node.kwargs, lambda item: device if item == _META else item)
            if "val" in node.meta:
                node.meta["val"] = map_aggregate(node.meta["val"], lambda value: _moved(value, device))
        if part is not gm:  # the body of a region, which programs call by its code
            part.recompile()


def describe_cast(gm: fx.GraphModule, host: nn.Module) -> str:
    """Return in which types `host` has tensors, where the graph has others; empty if it has the same.

    Args:
        gm: a graph with the types of its capture.
        host: the module whose tensors it reads, as they are inside a call that failed.
    """
    tensors = dict(chain(host.named_parameters(remove_duplicate=False), host.named_buffers(remove_duplicate=False)))
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor, value = tensors.get(str(node.target)), node.meta.get("val")
        if tensor is not None and isinstance(value, Tensor) and tensor.dtype != value.dtype:
            now, captured = _name(tensor.dtype), _name(value.dtype)
            return f"{node.target} is {now} in this call, and the graph was captured for {captured}"
    return ""


def _casts(gm: nn.Module, fn: Callable[[Tensor], Tensor]) -> dict[torch.dtype, torch.dtype]:
    """Return the floating-point dtypes of the tensors that `fn` changes, and what it makes of them."""
    tensors: Iterable[Tensor] = chain(gm.parameters(), gm.buffers())
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors if tensor.is_floating_point())
    casts: dict[torch.dtype, torch.dtype] = {}
    for dtype, device in kinds:
        with suppress(Exception), torch.no_grad():  # a function of the user's that takes no other tensors
            new = fn(torch.empty(0, dtype=dtype, device=device)).dtype
            casts |= {dtype: new} if new != dtype else {}
    return casts


def _cast(value: Any, casts: dict[torch.dtype, torch.dtype]) -> Any:
    return value.to(casts[value.dtype]) if isinstance(value, Tensor) and value.dtype in casts else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.device == _META else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
