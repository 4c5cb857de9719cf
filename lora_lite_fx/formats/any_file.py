"""Load adapters from a path of whatever kind, also into a slot of a bank; `save_slot` is the way back."""

from __future__ import annotations

import os
from pathlib import Path

from torch import fx, nn

from ..adapters.slot_optimizer import bank_placements
from ..rewriting.bank_slots import put_slot, take_slot
from ..rewriting.rewrite import remove
from ..rewriting.sums import graph_with_adapters
from .checkpoint import load, save
from .diffusers_files import FILE, load_diffusers
from .peft.directory import CONFIG, load_peft

WEIGHTS = "model.safetensors"
"""The name under which a Trainer looks for weights in a checkpoint."""


def load_any(
    model: nn.Module, path: str | os.PathLike[str], *, revision: str | None = None, subfolder: str = ""
) -> fx.GraphModule:
    """Load adapters from a file that `save` wrote, a PEFT directory or repository, a checkpoint, or diffusers' file.

    Args:
        model: as for `load`.
        path: of the file or directory; or "owner/name" of a repository on the Hub.
        adapter: as for `put_slot`.
        revision: as for `load_peft`.
        subfolder: as for `load_peft`.

    Raises:
        CheckpointError, AdapterError, CaptureError: as `load`.
    """
    where = Path(path) / subfolder
    if where.name == FILE or (where / FILE).is_file():
        return load_diffusers(model, where)
    # save_pretrained writes both: PEFT's form of PiSSA is LoRA, the other file has the adapter as it was.
    if (where / WEIGHTS).is_file():
        return load(model, where / WEIGHTS)
    if where.is_file():
        return load(model, where)
    if not where.exists() or (where / CONFIG).is_file() or revision is not None:
        return load_peft(model, path, revision=revision, subfolder=subfolder)
    return load(model, where / WEIGHTS)


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
        model: as for `take_slot`.
        slot: as for `take_slot`.
        path: as for `save`.
        adapter: as for `take_slot`.
        allow_nonfinite: as for `save`.

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
        model: as for `put_slot`, which says which adapters fit.
        slot: as for `put_slot`.
        path: a file that `save`, `save_slot` or diffusers wrote, a PEFT directory, a checkpoint, or the "owner/name" of
            a repository on the Hub.
        adapter: as for `put_slot`.
        revision: as for `load_peft`.
        subfolder: as for `load_peft`.

    Raises:
        ConfigError, AdapterError: as `put_slot`. Nothing is written then.
        CheckpointError: as `load` and `load_peft`.
    """
    graph = graph_with_adapters(model)
    bank_placements(graph, slot, adapter)
    put_slot(model, slot, load_any(remove(graph).eval(), path, revision=revision, subfolder=subfolder), adapter=adapter)
