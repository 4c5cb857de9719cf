"""`swap`: write any adapter into the room of a plain `LoRA`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.changed_buffers import check_same_buffers, moved_buffers
from ..adapters.placement import Placement, placements
from ..adapters.state import adapter_tensors
from ..adapters.switches import known_names
from ..errors import ConfigError
from ..graph.insertion import DEFAULT
from ..graph.tensors import outside_inference_mode, tensor_of
from ..variants import LoRA
from .factors import Factors
from .sums import change_of


@outside_inference_mode()
@torch.no_grad()
def swap(model: nn.Module, source: nn.Module, name: str = DEFAULT) -> None:
    """Write an adapter into the room of another, in place: `swap(gm, load(model, "it.safetensors"), "slot")`.

    The room is a `LoRA`, with the largest rank and all the sites that an adapter will need. Unused parts are
    zero. Only values change, so that nothing is compiled again, also in a compiled graph and in the module of an
    exported program.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`; the module of an exported program; or the `model` of a
            `backend`.
        source: a graph or adapted model over the same base, whose acting adapters are written; it is not changed.
        name: the name of the adapter that is the room.

    Raises:
        ConfigError: the room is not a plain `LoRA`; or the source has a site, or a rank, that the room has not.
            Nothing is written then.
        AdapterError: as `to_lora`.
    """
    adapter_tensors(model)
    (name,) = known_names(model, name)
    check_same_buffers(model, moved_buffers(source), "The source of swap")
    room = [placement for placement in placements(model) if placement.adapter_name == name]
    write_into_room(model, room, change_of(source))


def write_into_room(
    model: nn.Module, room: Sequence[Placement], found: Mapping[str, Factors], slot: int | None = None
) -> None:
    """Write changes of weights into a plain `LoRA` of a model, or into a slot of a bank of them, in place.

    Args:
        model: the model.
        room: the places of its adapter.
        found: the change of each site; at the others the adapter changes nothing afterwards.
        slot: of the bank.

    Raises:
        ConfigError: as `swap`.
    """
    name = room[0].adapter_name
    if slot is None and any(each.variant.slots for each in room):
        raise ConfigError(f"{name!r} is a bank. The way out: load_slot writes into one of its slots.")
    if wrong := [each for each in room if type(each.variant) is not LoRA or each.variant.bias or each.scale != 1]:
        raise ConfigError(
            f"The room of swap is a LoRA without bias, and {name!r} is {type(wrong[0].variant).__name__}."
        )
    if len({each.site for each in room}) != len(room):
        raise ConfigError(f"The room of swap is one LoRA, and {name!r} has several at a site.")
    if missing := sorted(found.keys() - {each.site for each in room}):
        raise ConfigError(
            f"The source adapts {missing[0]!r}, at which {name!r} has no room; {len(missing)} such sites."
        )
    written: list[tuple[Tensor, Tensor]] = []
    for each in room:
        local: Any = each.local
        stored = [tensor_of(model, each.tensors[own]) for own in ("lora_A", "lora_B")]
        places = stored if slot is None else [tensor[slot] for tensor in stored]
        a, b = map(torch.zeros_like, places)
        if each.site in found:
            factors = found[each.site]
            rank = factors.rank
            if rank > a.shape[-2]:
                raise ConfigError(
                    f"The source has the rank {rank} at {each.site!r}, and {name!r} has room for {a.shape[-2]}. The way"
                    f" out: a room of that rank; or an approximation, llfx.to_lora(source, r={a.shape[-2]})[0]."
                )
            a[..., :rank, :].copy_(factors.a)
            b[..., :rank].copy_(factors.b / local.scale)
        written += zip(places, (a, b), strict=True)
    for tensor, value in written:
        tensor.copy_(value)
