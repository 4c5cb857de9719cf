"""Let processes that compute a graph together agree when a call begins: on its inputs, and on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from ..compat.torch import is_wrapped, not_compiled
from ..errors import CallError

_OF_A_CALL_BEFORE = ("cache", "past")
"""The names of inputs that another call has returned begin with these. They are large, and were compared as inputs."""


def begin_together(graph: fx.Graph, mesh: DeviceMesh, may_draw: fx.Node | bool) -> None:
    """Let a call begin with a check that all processes have the same inputs, and with one state of their generators.

    A process computes its part of what all have, so that other inputs in one of them make wrong results in all.

    Args:
        graph: changed in place.
        mesh: of the processes.
        may_draw: whether the call draws random numbers, or the node that says so.
    """
    inputs = graph.find_nodes(op="placeholder")
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    if not tensors:
        return
    compared = [node for node in tensors if not node.name.startswith(_OF_A_CALL_BEFORE)] or tensors
    place = max(inputs[-1], may_draw) if isinstance(may_draw, fx.Node) else inputs[-1]
    with graph.inserting_after(place):
        names = tuple(str(node.target) for node in compared)
        first = graph.call_function(beginning_together(mesh, names), (may_draw, *compared))
    first.meta = dict(compared[0].meta)
    compared[0].replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)


def beginning_together(mesh: DeviceMesh, names: Sequence[str]) -> Callable[..., Tensor | None]:
    """Return a function that returns the first of its tensors, after all processes have agreed.

    Args:
        mesh: of the processes.
        names: of the tensors, for messages.
    """

    @not_compiled
    def begun_together(may_draw: Any, *values: Tensor | None) -> Tensor | None:
        given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        if not is_wrapped(*given.values()):
            _compare(mesh, given, int(may_draw))
        if may_draw:
            module: Any = torch if mesh.device_type == "cpu" else torch.get_device_module(mesh.device_type)
            state = module.get_rng_state().to(mesh.device_type)
            dist.broadcast(state, group=mesh.get_group(), group_src=0)
            module.set_rng_state(state.cpu())
        return values[0]

    return begun_together


@torch.no_grad()
def _compare(mesh: DeviceMesh, values: Mapping[str, Tensor], modes: int) -> None:
    """Raise CallError in all processes if one of them has other values, or other modes, of which `modes` tells."""
    hashes = {name: hash_of(value) for name, value in values.items()}
    hashes["the mode"] = torch.tensor(modes, device=mesh.device_type)
    own = hash_of(torch.stack([*hashes.values()]))
    extremes = torch.stack([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.get_group())
    largest, smallest = extremes.tolist()
    if largest == -smallest:
        return
    said: list[Any] = [None] * mesh.size()
    dist.all_gather_object(said, {name: value.item() for name, value in hashes.items()}, group=mesh.get_group())
    pairs = ((process, name) for process, other in enumerate(said) for name in {**said[0], **other})
    process, name = next((i, name) for i, name in pairs if said[i].get(name) != said[0].get(name))
    raise CallError(
        f"Processes 0 and {process} call a graph that they compute together with other values of {name}. Tensor"
        " parallelism takes one batch. The way out: the same batch and the same mode in all processes of the mesh, and"
        " for what is sampled the same seed, torch.manual_seed(0)."
    )


def hash_of(values: Tensor) -> Tensor:
    """Return a number of 62 bits that depends on the values, on their order, and on the shape."""
    flat = (torch.view_as_real(values) if values.is_complex() else values).detach().contiguous().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view(_WHOLE_NUMBERS[flat.element_size()])
    numbers = torch.cat([flat.new_tensor(values.shape, dtype=torch.long), flat.long()]) + 1
    places = torch.arange(1, len(numbers) + 1, device=values.device) * _ODD
    mixed: Tensor = (numbers * places) ^ (numbers * places >> 29)
    return (mixed * places).sum() & (2**62 - 1)


_ODD = 0x9E3779B97F4A7C1
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
