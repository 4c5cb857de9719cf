"""`save_slot` and `load_slot`: the adapter of a slot of a bank, from and to the files of single adapters."""

from __future__ import annotations

import os

from torch import nn

from ..adapters.slot_optimizer import bank_placements
from ..rewriting.bank_slots import put_slot, take_slot
from ..rewriting.rewrite import remove
from ..rewriting.sums import graph_with_adapters
from .any_file import load_any
from .checkpoint import save


def save_slot(
    model: nn.Module,
    slot: int,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write the adapter of a slot of a bank to a file, as `save` writes that of a model with this adapter alone.

    `save_peft(take_slot(model, slot), path)` and the other functions that save write it in their forms.

    Args:
        model, slot, adapter: as for `take_slot`.
        path, allow_nonfinite: as for `save`.

    Raises:
        ConfigError, AdapterError: as `take_slot`.
        CheckpointError: as `save`.
    """
    save(take_slot(model, slot, adapter=adapter), path, allow_nonfinite=allow_nonfinite)


def load_slot(
    model: nn.Module,
    slot: int,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
) -> None:
    """Load an adapter into a slot of a bank, in place. Nothing is compiled again.

    Args:
        model, slot, adapter: as for `put_slot`, which says which adapters fit.
        path: a file that `save`, `save_slot` or diffusers wrote, a PEFT directory, a checkpoint, or the "owner/name" of
            a repository on the Hub.
        revision, subfolder: as for `load_peft`.

    Raises:
        ConfigError, AdapterError: as `put_slot`. Nothing is written then.
        CheckpointError: as `load` and `load_peft`.
    """
    graph = graph_with_adapters(model)
    bank_placements(graph, slot, adapter)
    put_slot(model, slot, load_any(remove(graph).eval(), path, revision=revision, subfolder=subfolder), adapter=adapter)
