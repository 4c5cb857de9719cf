"""Gather the adapters of a pipeline, of which each process has those of its stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..adapters.changed_buffers import moved_buffers
from ..adapters.placement import Placement, placements
from ..adapters.state import adapter_values
from ..distributed.split import Stage
from ..errors import AdapterError, CheckpointError
from ..graph.sharded import is_stage


@dataclass(frozen=True)
class Held:
    """The adapters of a model, or of all stages of a pipeline.

    Args:
        placed: the adapters in their places.
        values: their tensors by qualified name.
        prints: the fingerprints of the frozen weights of their sites, by site.
        buffers: those that differ from the base's, by qualified name.
    """

    placed: Sequence[Placement]
    values: Mapping[str, Tensor]
    prints: Mapping[str, str]
    buffers: Mapping[str, Tensor]


def held_by(model: nn.Module, adapter: str | None, prints_of: Callable[[nn.Module, list[str]], dict[str, str]]) -> Held:
    """Return the adapters of a model; of a stage, those of all stages, for which all processes come here.

    Args:
        model: has adapters.
        adapter: the name of the adapter whose sites are fingerprinted; None for all.
        prints_of: returns the fingerprints of sites of a model.

    Raises:
        CheckpointError: not all stages come here; in all processes.
        AdapterError: the model records an adapter at a site that its graph does not show any more; in all processes.
    """
    stage_of = model.stage_of if isinstance(model, Stage) else None
    failure = ""
    values: dict[str, Tensor] = {}
    prints: dict[str, str] = {}
    buffers = moved_buffers(model)
    try:
        values = adapter_values(model)
        chosen = [placement for placement in placements(model) if adapter in (None, placement.adapter_name)]
        prints = prints_of(model, list(dict.fromkeys(placement.site for placement in chosen)))
    except AdapterError as error:
        if stage_of is None:
            raise
        failure = str(error)
    if stage_of is None:
        return Held(placements(model), values, prints, buffers)
    found: list[Any] = [(stage_of.index, values, prints, buffers, failure)]
    if dist.is_initialized():
        values, buffers = ({name: value.cpu() for name, value in each.items()} for each in (values, buffers))
        own = (stage_of.index, values, prints, buffers, failure)
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
    if failure := next((said for *_, said in found if said), ""):
        raise AdapterError(failure)
    if missing := sorted({*range(stage_of.count)} - {index for index, *_ in found}):
        raise CheckpointError(
            f"A file holds the adapters of all {stage_of.count} stages, and no process gave stage {missing[0]}: nothing"
            " was written. The way out: call save in all processes at once, each with its stage; or, where a process"
            " has several stages, torch.distributed.checkpoint.save of what adapter_state_dict returns for each."
        )
    whole = Held(stage_of.placed, {}, {}, {})
    for _, values, prints, buffers, _ in found:
        whole = Held(whole.placed, {**values, **whole.values}, {**prints, **whole.prints}, {**buffers, **whole.buffers})
    return whole


def refuse_stage(model: object, file: str) -> None:
    """Raise AdapterError if `model` is a stage, which another file than that of `save` is to be written of."""
    if is_stage(model):
        raise AdapterError(
            f"{file} cannot be written of a stage of a pipeline. The way out: llfx.save(stage, path) in all processes,"
            " and load(base, path) in one that has the whole base."
        )
