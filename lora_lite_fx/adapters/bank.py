"""Banks: many adapters of one config, stacked, of which each row of a batch has its own.

The config of a bank is that of its adapters with a number of slots. Its tensors have the slots as their first
dimension, and its graph has one more input, `adapter_ids (batch,)`: the slot of each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar, overload

import torch
from torch import Tensor

from ..errors import AdapterError, CallError, ConfigError, shown
from ..graph.direct_calls import can_read_values
from .named_configs import not_a_variant
from .variant import Variant

IDS = "adapter_ids"
"""The name of the input that has the slot of each row."""

V = TypeVar("V", bound=Variant)


@overload
def Bank(cfg: V, slots: int) -> V: ...
@overload
def Bank(cfg: Sequence[Variant], slots: int) -> list[Variant]: ...
def Bank(cfg: Variant | Sequence[Variant], slots: int) -> Variant | list[Variant]:
    """Return the config of a bank: `rewrite(model, Bank(LoRA(r=16), slots=64))`, `gm(ids, adapter_ids=slot_of_row)`.

    A bank is `slots` adapters of one config in one graph. Each row of a batch is computed by the adapter of its slot,
    and by the frozen model where its id is -1. The adapters are stacked, `(slots, r, d_in)`, so that a mixed batch is
    one product with the factors of its rows. Changing the ids compiles nothing.

    Args:
        cfg: the config of the adapters, or several.
        slots: how many there are.

    Returns:
        The config, or a list of them, with this number of slots.

    Raises:
        ConfigError: `cfg` is not a config of a variant, or `slots` not a positive integer. `rewrite` refuses a variant
            whose `forward` uses functions that are not known of values which belong to several adapters. With
            AdapterError it refuses a site at which the graph does not prove which row of the batch is which.
    """
    if isinstance(cfg, Sequence) and not isinstance(cfg, str):
        return [Bank(each, slots) for each in cfg]
    if not isinstance(cfg, Variant):
        raise not_a_variant(cfg)
    if type(slots) is not int or slots < 1:
        raise ConfigError(f"Bank takes the number of its adapters, slots=8, not {shown(slots)}.")
    return replace(cfg, slots=slots)


def check_no_bank(variants: Iterable[Variant], function: str, way_out: str) -> None:
    """Raise ConfigError if a config is that of a bank, which a function does not take.

    Args:
        variants: the configs.
        function: the name of the function.
        way_out: what to do instead.
    """
    for variant in variants:
        if variant.slots:
            raise ConfigError(
                f"{function} takes no bank ({type(variant).__name__} with slots={variant.slots}). {way_out}"
            )


def check_ids(ids: object) -> Tensor:
    """Return the ids of a call.

    Raises:
        ConfigError: they are not a tensor `(batch,)` of integers.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        what = f"a tensor {tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else shown(ids)
        raise ConfigError(f"{IDS} is a tensor (batch,) of integers, the slot of each row, not {what}.")
    return ids


def check_slots(ids: Tensor, slots: int) -> None:
    """Check that each id is a slot of a bank, or -1. Ids whose values cannot be read, as in a trace, are not checked.

    Raises:
        AdapterError: one is not.
    """
    if not can_read_values(ids):
        return
    wrong = (ids < -1) | (ids >= slots)
    if wrong.any():  # the one value that is read, for which a GPU is waited for
        raise AdapterError(
            f"{IDS} has {int(ids[wrong][0])}, and the bank has {slots} slots: 0 to {slots - 1}, and -1 for the frozen"
            " model."
        )


def check_rows(ids: Tensor, rows: int) -> None:
    """Raise CallError unless there is an id for each row of a batch."""
    if len(ids) != rows:
        raise CallError(f"There are {len(ids)} {IDS}, one for each row of the batch, and {rows} rows.")


def check_coefficients(scale: Tensor, rows: int) -> None:
    """Raise CallError unless there is a coefficient for each row of a batch."""
    if len(scale) != rows:
        raise CallError(
            f"There are {len(scale)} coefficients of an adapter, one for each row of the batch, and {rows} rows. The"
            " way out: by_row with a name, or scaled with a coefficient, for each row of the inputs."
        )


def ids_of(ids: Tensor | None) -> Tensor:
    """Return the ids of a call.

    Raises:
        CallError: there are none.
    """
    if ids is None:
        raise CallError(
            f"{IDS} is missing: the model has a bank, with an adapter for each row of a batch. The way out: pass"
            f" {IDS}=, the slot of each row, or -1 for the frozen model; or `with llfx.by_row(model, ids):` around the"
            " call."
        )
    return ids
