"""Parameters that `fully_shard` has divided among processes: each process has a part, and calls gather the whole."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from ..errors import AdapterError, is_instance_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Check whether `value` is a tensor of which processes have parts.

    It does not import the class, because that takes half a second: nobody has such a tensor before the class is there.
    """
    return isinstance(value, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_sharded(model: nn.Module) -> bool:
    """Check whether processes have parts of the model's parameters: by `fully_shard`, or by tensor parallelism."""
    return any(_shards(module) for module in model.modules()) or any(
        is_dtensor(parameter) for parameter in model.parameters()
    )


def is_stage(model: object) -> bool:
    """Check whether `model` is a stage of a pipeline, see `llfx.split`."""
    return getattr(model, "stage_of", None) is not None


def _shards(module: nn.Module) -> bool:
    return is_instance_of(module, "torch", "FSDPModule")


def reshard(model: nn.Module) -> None:
    """Let each parameter of a sharded model be this process's part of it again.

    The outermost parameters stay whole from a forward pass to its backward pass. They are other objects then, which are
    read right, but what is written to them is lost, and an optimizer that gets them trains nothing.
    """
    modules: list[Any] = [module for module in model.modules() if _shards(module)]
    for module in modules:
        module.reshard()


def refuse_sharded(model: object, what: str, way_out: str) -> None:
    """Raise AdapterError if processes have parts of the parameters of `model`, or of its layers.

    Args:
        model: anything.
        what: was asked for, as in "add cannot change a model".
        way_out: an imperative.
    """
    if isinstance(model, nn.Module) and is_sharded(model):
        raise AdapterError(f"{what} whose parameters are sharded. The way out: {way_out}.")
    if is_stage(model):
        raise AdapterError(f"{what} which is a stage of a pipeline. The way out: do this before split.")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which each process has a part, gathered by all of them; another as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copy values in place between tensors of which processes may have parts.

    Args:
        target: of any layout. If processes have parts of it and `source` is whole, they get those of process 0.
        source: of the same shape.
    """
    if not is_dtensor(target):
        target.copy_(whole(source))
    elif is_dtensor(source):
        target.copy_(source)
    else:
        from torch.distributed.tensor import distribute_tensor

        local = source.detach().to(target.device)
        target.copy_(distribute_tensor(local, target.device_mesh, target.placements))
