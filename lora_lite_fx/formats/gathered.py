"""Write adapters of which several processes have parts, of sharded models or of the stages of a pipeline.

All processes gather the values, and one of them writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..adapters.changed_buffers import moved_buffers
from ..adapters.placement import Placement, adapter_tensor_names, placements
from ..adapters.state import adapter_values
from ..distributed.split import Stage
from ..errors import AdapterError, CheckpointError
from ..graph.sharded import is_dtensor, is_sharded, is_stage, reshard, whole
from ..graph.tensors import register_tensor
from .base_fingerprints import fingerprints


@contextmanager
def gathered(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Let a sharded model have its adapters whole in the body, as all that writes files reads them.

    Args:
        model: adapted; nothing happens to one that is not sharded. All processes must come here.
        values: the whole tensors of the model by name, if they are gathered already. One process alone may come then.

    Raises:
        CheckpointError: `values` lacks a tensor.
    """
    reshard(model)
    sharded = {name: tensor for name, tensor in model.named_parameters() if is_dtensor(tensor)}
    if values is None:
        # The frozen weights stay sharded, because all of them may not fit. Each is gathered where it is read.
        adapters = {*adapter_tensor_names(model)} & sharded.keys()
        found = {name: whole(sharded[name].detach()) for name in sharded if name in adapters}
    elif lacking := [name for name in sharded if name not in values]:
        raise CheckpointError(
            f"The state dict lacks {len(lacking)} of the {len(sharded)} sharded parameters of the model, as"
            f" {lacking[0]}: nothing was written. Gather all of them, as accelerator.get_state_dict(model) does."
        )
    else:
        found = {name: values[name] for name in sharded}
    try:
        for name, tensor in found.items():
            register_tensor(model, name, nn.Parameter(tensor.detach(), requires_grad=sharded[name].requires_grad))
        yield
    finally:
        for name in found:
            register_tensor(model, name, sharded[name])


def write_once(model: nn.Module, write: Callable[[], None], *, alone: bool = False) -> None:
    """Call `write`; of a sharded model or a stage on process 0 alone, and return on all processes when it is done.

    Args:
        model: the model whose adapters are written.
        write: writes files.
        alone: whether one process alone comes here.

    Raises:
        CheckpointError: it could not be written; on all processes.
    """
    if alone or not (is_sharded(model) or is_stage(model)):
        write()
        return
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except CheckpointError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


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


def held_by(model: nn.Module, adapter: str | None) -> Held:
    """Return the adapters of a model; of a stage, those of all stages, for which all processes come here.

    Args:
        model: has adapters.
        adapter: the name of the adapter whose sites are fingerprinted; None for all.

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
        prints = fingerprints(model, [placement.site for placement in chosen])
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
            " was written. The way out: call save in all processes at once, each with its stage. Or, where a process"
            " has several stages: torch.distributed.checkpoint.save of what adapter_state_dict returns for each."
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
