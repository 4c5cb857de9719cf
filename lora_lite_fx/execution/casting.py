"""What a cast or a move of an adapted graph's tensors, such as `gm.to(torch.bfloat16)`, means for the graph itself.

A graph that holds no dtypes computes in those of its tensors, so that only the recorded dtypes of its values change.
Most graphs that are exported hold some: `x.to(y.dtype)` in a model becomes a cast to the dtype that `y` had at capture.
The devices that it holds become those of the move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..compat.torch import ENTER_AUTOCAST, FakeTensor
from ..errors import AdapterError
from ..graph.regions import AUTOCAST_REGION

Moves = Mapping[torch.device, torch.device]
"""Where the tensors of each device are moved to."""


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


def moves_of(gm: nn.Module, fn: Callable[[Tensor], Tensor]) -> Moves:
    """Return the devices that `fn`, as `nn.Module._apply` gets it, moves tensors of `gm` from, and where to."""
    moves: dict[torch.device, torch.device] = {}
    for device in dict.fromkeys(tensor.device for tensor in chain(gm.parameters(), gm.buffers())):
        with suppress(Exception), torch.no_grad():  # as in `_casts`
            new = fn(torch.empty(0, device=device)).device
            moves |= {device: new} if new != device else {}
    return moves


def moved_device(item: Any, moves: Moves) -> Any:
    """Return where a device is moved to, and anything else as it is.

    A device without an index is the one of its type that is moved.
    """
    if not isinstance(item, torch.device):
        return item
    alike = (new for old, new in moves.items() if item.index is None and item.type == old.type)
    return moves.get(item) or next(alike, item)


def follow_move(gm: fx.GraphModule, moves: Moves) -> None:
    """Let the graph follow a move of its tensors to other devices.

    A graph holds devices: of the tensors that it makes, and of regions of autocast.
    """
    kinds = {old.type: new.type for old, new in moves.items()}
    for part in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in part.graph.nodes:
            node.args = map_aggregate(node.args, lambda item: moved_device(item, moves))
            node.kwargs = map_aggregate(node.kwargs, lambda item: moved_device(item, moves))
            if node.target in (ENTER_AUTOCAST, AUTOCAST_REGION):
                node.update_arg(0, kinds.get(node.args[0], node.args[0]))
            if "val" in node.meta:
                node.meta["val"] = map_aggregate(node.meta["val"], lambda value: _moved(value, moves))
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


def describe_move(gm: fx.GraphModule, host: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return which input or tensor of a call is on another device than the graph, and the way out; empty if none is.

    Args:
        gm: a graph with the devices of its capture, or of its last move.
        host: the module whose tensors it reads.
        inputs: those of the call, by name.
    """
    named = chain(host.named_parameters(remove_duplicate=False), host.named_buffers(remove_duplicate=False))
    tensors = {"placeholder": inputs, "get_attr": dict(named)}
    for node in (node for op in tensors for node in gm.graph.find_nodes(op=op)):
        tensor, value = tensors[node.op].get(str(node.target)), node.meta.get("val")
        if not isinstance(tensor, Tensor) or not isinstance(value, Tensor) or tensor.device == value.device:
            continue
        said = f"{node.target} is on {tensor.device} in this call, and the graph is on {value.device}"
        if node.op == "placeholder":
            return f'{said}. The way out: model.to("{tensor.device}"), or {node.target}.to("{value.device}")'
        return f'{said}. The way out: model.to("{tensor.device}") moves all of its tensors, and the graph'
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


def _moved(value: Any, moves: Moves) -> Any:
    if not isinstance(value, Tensor):
        return value
    with value.fake_mode if isinstance(value, FakeTensor) else nullcontext():
        return value.to(moved_device(value.device, moves))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
