"""Write the adapters of sharded models: all processes gather the values, and one of them writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from ..adapters.placement import adapter_tensor_names
from ..errors import CheckpointError
from ..graph.sharded import is_dtensor, is_sharded, is_stage, reshard, whole
from ..graph.tensors import register_tensor


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
