"""The slots of a bank: take one out as an adapter of its own, put an adapter into one, or start one anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.changed_buffers import check_same_buffers, moved_buffers
from ..adapters.param_spec import one_of
from ..adapters.placement import Placement, site_bias, site_weight
from ..adapters.slot_optimizer import bank_placements
from ..adapters.start_values import initialize
from ..adapters.switches import coefficients
from ..adapters.variant import Variant
from ..errors import ConfigError, counted
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..graph.insertion import DEFAULT, SHARED
from ..graph.tensors import outside_inference_mode, tensor_of
from ..variants import LoRA
from .factors import Factors
from .reconfigure import PLACE_FIELDS
from .rewrite import insert_placed, without_adapters
from .sums import change_of, graph_with_adapters
from .swap import write_into_room


@outside_inference_mode()
@torch.no_grad()
def take_slot(model: nn.Module, slot: int, *, adapter: str | None = None) -> fx.GraphModule:
    """Return a graph whose one adapter is that of a slot of a bank, with copies of its values.

    All that takes an adapter takes it: `save_peft(take_slot(gm, 3), path)`, `merge`, `to_lora`.

    Args:
        model: a result of `rewrite`, `adapt` or `load` that has a bank; it is not changed.
        slot: the slot, from 0.
        adapter: the name of the bank; None if there is one alone.

    Raises:
        ConfigError: the model has no such bank or slot.
        AdapterError: it has no adapters, or was made by `wrap` or `backend`.
    """
    graph = graph_with_adapters(model)
    placed, tensors = slot_alone(graph, slot, adapter)
    base = without_adapters(graph)
    insert_placed(base, placed, {}, tensors)
    return base


def slot_alone(graph: AdaptedGraphModule, slot: int, adapter: str | None) -> tuple[list[Placement], dict[str, Tensor]]:
    """Return the adapter of a slot in its places in a model that has it alone, and copies of its values by name.

    Args:
        graph: has the bank.
        slot, adapter: as for `take_slot`.

    Raises:
        ConfigError: the graph has no such bank or slot.
    """
    bank = bank_placements(graph, slot, adapter, graph.derived.placements)
    placed: list[Placement] = []
    tensors: dict[str, Tensor] = {}
    for index, config in enumerate(dict.fromkeys(each.adapter for each in bank)):
        for old in (each for each in bank if each.adapter == config):
            one = replace(old.variant, slots=None)
            new = replace(old, variant=one, adapter=index, adapter_name=DEFAULT)
            placed.append(new)
            for own, path in old.tensors.items():
                tensors.setdefault(new.tensors[own], _copy_of(tensor_of(graph, path), own, slot))
    return placed, tensors


@outside_inference_mode()
@torch.no_grad()
def put_slot(model: nn.Module, slot: int, source: nn.Module, *, adapter: str | None = None) -> None:
    """Write the adapter of another model over the same base into a slot of a bank, in place. Nothing is compiled again.

    An adapter of the bank's own config is copied to the bit. A bank of plain `LoRA` takes any adapter of a rank up to
    its own, at some of its sites: what is not used of the slot is zero.

    Args:
        model: a result of `rewrite`, `adapt` or `load` that has a bank.
        slot: the slot, from 0.
        source: a graph or an adapted model with one adapter; it is not changed.
        adapter: the name of the bank; None if there is one alone.

    Raises:
        ConfigError: the model has no such bank or slot, or the adapter does not fit it. Nothing is written then.
        AdapterError: as `take_slot`; or as `to_lora`, for an adapter of another config.
    """
    graph = graph_with_adapters(model)
    bank = bank_placements(graph, slot, adapter, graph.derived.placements)
    given = graph_with_adapters(source)
    check_same_buffers(graph, moved_buffers(given), f"Slot {slot}")
    own = [] if _is_scaled(source) else given.derived.placements
    write_slot(graph, bank, slot, own, given, lambda: change_of(source))


def write_slot(
    graph: fx.GraphModule,
    bank: Sequence[Placement],
    slot: int,
    own: Sequence[Placement],
    given: nn.Module,
    change: Callable[[], Mapping[str, Factors]],
) -> None:
    """Write an adapter into a slot of a bank, after all checks.

    Args:
        graph: has the bank.
        bank: its places.
        slot: the slot.
        own: the adapter in its places; none if it acts otherwise than these say.
        given: a module that has its tensors.
        change: returns what it changes each weight by; asked if it is not of the bank's own config.

    Raises:
        ConfigError, AdapterError: as `put_slot`.
    """
    if values := _same_adapter(bank, own, graph, given, slot):
        for place, value in values:
            place.copy_(value)
        return
    if {type(each.variant) for each in bank} != {LoRA}:
        kinds = " and ".join(dict.fromkeys(type(each.variant).__name__ for each in own))
        raise ConfigError(
            f"The adapter is {kinds} at {counted(len(own), 'site')}, and the bank has slots of"
            f" {type(bank[0].variant).__name__} at {counted(len(bank), 'site')}. The way out: an adapter of the bank's"
            " config, or a bank of LoRA, which takes others too."
        )
    write_into_room(graph, bank, change(), slot)


@outside_inference_mode()
@torch.no_grad()
def reset_slot(model: nn.Module, slot: int, *, adapter: str | None = None) -> None:
    """Start a slot of a bank anew, in place, with start values drawn again.

    Args:
        model: a result of `rewrite`, `adapt` or `load` that has a bank.
        slot: the slot, from 0.
        adapter: the name of the bank; None if there is one alone.

    Raises:
        ConfigError: the model has no such bank or slot, or its adapters start from data.
        AdapterError: as `take_slot`.
    """
    graph = graph_with_adapters(model)
    bank = bank_placements(graph, slot, adapter, graph.derived.placements)
    for each in bank:
        if type(each.variant).observer is not Variant.observer:
            raise ConfigError(
                f"{type(each.variant).__name__} starts from data, which reset_slot has not. The way out: load_slot of"
                " an adapter that was made with calibration data."
            )
    sites = {site.name: site for site in account_for(graph).sites}
    for each in bank:
        site = sites[each.site]
        one = replace(each.local, slots=None)
        initialize(
            one, site, site_weight(graph, site), one_of(each.namespace(graph), slot), None, site_bias(graph, site)
        )


def _copy_of(tensor: Tensor, own: str, slot: int) -> Tensor:
    value = (tensor if own.startswith(SHARED) else tensor[slot]).detach().clone()
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


def _same_adapter(
    bank: Sequence[Placement], own: Sequence[Placement], graph: nn.Module, given: nn.Module, slot: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the places in a slot with their new values, for an adapter of the bank's config; none for another one."""
    at = {(each.site, each.position): each for each in own}
    if at.keys() != {(each.site, each.position) for each in bank} or len(at) != len(own):  # several of several names
        return []
    written: list[tuple[Tensor, Tensor]] = []
    for each in bank:
        other = at[each.site, each.position]
        if _maths(each.local) != _maths(other.local) or each.names != other.names or other.scale != each.scale:
            return []
        for name in each.names:
            place, value = tensor_of(graph, each.tensors[name]), tensor_of(given, other.tensors[name])
            if name.startswith(SHARED):
                if not torch.equal(place, value):
                    return []
                continue
            if place[slot].shape != value.shape:
                return []
            written.append((place[slot], value))
    return written


def _is_scaled(source: nn.Module) -> bool:
    """Return whether an adapter of a model acts by another coefficient than 1."""
    by_name = coefficients(source, "A slot")
    return by_name is not None and any(coefficient != 1 for coefficient in by_name.values())


def _maths(variant: Variant) -> tuple[type, Mapping[str, Any]]:
    """Return what a config says of what its adapters compute, and not of where they are and how they are stored."""
    fields = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    skipped = {*PLACE_FIELDS, *(name for name in fields if name.endswith("_pattern"))}
    return type(variant), {name: value for name, value in fields.items() if name not in skipped}
