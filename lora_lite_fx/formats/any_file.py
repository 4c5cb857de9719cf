"""Load adapters from a path of whatever kind, also into a slot of a bank; `save_slot` is the way back."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.changed_buffers import check_same_buffers, moved_buffers, moved_from_base
from ..adapters.slot_optimizer import bank_placements
from ..graph.tensors import outside_inference_mode
from ..rewriting.bank_slots import slot_alone, write_slot
from ..rewriting.capture import capture
from ..rewriting.factors import Factors, known_changes
from ..rewriting.rewrite import remove
from ..rewriting.sums import change_of, graph_with_adapters
from .atomic_writing import write_atomically
from .base_fingerprints import fingerprint_at
from .checkpoint import adapters_of_checkpoint, file_of, read_checkpoint
from .diffusers_files import FILE, read_diffusers
from .filed_adapter import FiledAdapter, insert_filed, placed_alone
from .gathered import Held, gathered, write_once
from .peft.directory import CONFIG, directory_of, read_directory
from .peft.read_adapter import adapters_at_sites
from .untrusted_files import as_path

WEIGHTS = "model.safetensors"
"""The name under which a Trainer looks for weights in a checkpoint."""


@outside_inference_mode()
def load_any(
    base: fx.GraphModule, path: str | os.PathLike[str], *, revision: str | None = None, subfolder: str = ""
) -> fx.GraphModule:
    """Load adapters from a file that `save` wrote, a PEFT directory or repository, a checkpoint, or diffusers' file.

    Args:
        base: a graph without adapters, which is not changed.
        path: of the file or directory; or "owner/name" of a repository on the Hub.
        revision: as for `load_peft`.
        subfolder: as for `load_peft`.

    Raises:
        CheckpointError, AdapterError, CaptureError: as `load`.
    """
    gm = capture(base)
    buffers, adapters = _adapters_in(gm, path, revision, subfolder)
    return insert_filed(gm, adapters, Path(path), "load", name=None, stack=False, buffers=buffers)


def _adapters_in(
    graph: fx.GraphModule, path: str | os.PathLike[str], revision: str | None, subfolder: str
) -> tuple[dict[str, Tensor], list[FiledAdapter]]:
    """Return the buffers and the adapters that are at a path, at the sites of a graph, after the checks of `load`.

    Raises:
        CheckpointError: as `load`, `load_peft` and `load_diffusers`.
    """
    where = Path(path) / subfolder
    if where.name == FILE or (where / FILE).is_file():
        return {}, adapters_at_sites(graph, read_diffusers(graph, where))
    is_file = where.is_file() or (where.suffix == Path(WEIGHTS).suffix and not where.exists() and revision is None)
    file = where if is_file else where / WEIGHTS
    is_peft = not is_file and (not where.exists() or (where / CONFIG).is_file() or revision is not None)
    # save_pretrained writes both: PEFT's form of PiSSA is LoRA, the other file has the adapter as it was.
    if is_peft and not file.is_file():
        return {}, adapters_at_sites(graph, read_directory(directory_of(path, revision, subfolder)))
    return adapters_of_checkpoint(graph, graph, read_checkpoint(file))


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
    file = as_path(path, "save_slot(model, slot, path)")
    with gathered(model):
        graph = graph_with_adapters(model)
        placed, tensors = slot_alone(graph, slot, adapter)
        values = {name: tensor.detach() for name, tensor in tensors.items()}
        names = {each.site for each in placed}
        adapted = account_for(graph, [*graph.derived.sites.values()]).adapted("save_slot")
        prints = {site.name: fingerprint_at(graph, site) for site in adapted if site.name in names}
        data = file_of(Held(placed, values, prints, moved_buffers(graph)), file, None, allow_nonfinite)
    write_once(model, lambda: write_atomically(file, data))


@outside_inference_mode()
@torch.no_grad()
def load_slot(
    model: nn.Module,
    slot: int,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
) -> None:
    """Load an adapter into a slot of a bank, in place. Nothing is captured or compiled.

    The file is checked as by `load`. An adapter that is neither of the bank's config nor of two factors (DoRA into a
    bank of LoRA) takes seconds, because its change of each weight is computed, and factorized.

    A call that uses the slot meanwhile, in another thread, may read a part of each adapter. Load into a slot that no
    call uses, and then let new calls use that one. No slot may be loaded inside `frozen`, which `generate` opens.

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
    bank = bank_placements(graph, slot, adapter, graph.derived.placements)
    buffers, adapters = _adapters_in(graph, path, revision, subfolder)
    placed, tensors = placed_alone(graph, adapters)
    check_same_buffers(graph, moved_from_base(graph, buffers), f"Slot {slot}")

    def change() -> dict[str, Factors]:
        if (known := known_changes(placed, tensors)) is not None:
            return known
        alone = insert_filed(
            remove(graph).eval(), adapters, Path(path), "load_slot", name=None, stack=False, buffers=buffers
        )
        return change_of(alone)

    write_slot(graph, bank, slot, placed, tensors, change)
