"""`shard`: divide the parameters of an adapted model among processes, by `fully_shard` of torch."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..adapters.state import adapter_tensors
from .agreement import agree, broadcast_adapters, mesh_for
from .units import RunsGraphs, Unit, problem_of, units_of

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    """Divide the parameters of a model among processes, each layer for itself and the rest at the root; in place.

    Each process keeps its part of every parameter. A layer's are gathered for its forward pass, freed, and gathered
    again for its backward pass; so a process has the whole of one layer or two at a time, and of what stands outside of
    layers. The frozen base is gathered only. The gradients of adapters are averaged over the processes and divided like
    the adapters. That is `fully_shard` on each layer and on the model, after checks that all processes have the same
    model, and that a graph gathers all that it reads. Adapters start with the values that process 0 has.

    Memory is freed when nothing else has the whole tensors, as the model that was captured has: `del model` there.

    Make the optimizer afterwards, of `adapter_parameters(model)`. `save` and `save_peft` are called in all processes,
    and process 0 writes whole tensors. What changes graphs comes before: `add`, `delete`, `merge`, and the first call
    of each kind of an adapted model.

    Args:
        model: a result of `rewrite`, `load` or `adapt`.
        mesh: of the processes, with one dimension, or with two that have names, to keep copies (the first) of what is
            divided (the second). None for one dimension of all processes, on the device of the model.
        options: of `fully_shard`: `reshard_after_forward`, `mp_policy`, `offload_policy`, `ignored_params` and so on.

    Returns:
        The model, whose class has become one of `FSDPModule` too.

    Raises:
        AdapterError: processes are not set up; the model has no adapters, or no graph; it is sharded already, or cannot
            be; or processes have different models. The model is unchanged then, in all processes.
        TypeError: `fully_shard` has no such option.
    """
    adapter_tensors(model)  # refuses a model without adapters, and says what to pass instead
    mesh = mesh_for(model, mesh, "shard")
    units = units_of(model, options.get("ignored_params") or ())
    agree(model, mesh, _problem_of_mesh(mesh) or problem_of(model, units, options), "shard")
    broadcast_adapters(model, mesh)
    _fully_shard(units, mesh, options)
    if isinstance(model, RunsGraphs):
        model.bind_graphs()  # which keep the whole tensors otherwise
    return model


def _problem_of_mesh(mesh: DeviceMesh) -> str:
    if mesh.ndim > 2 or (mesh.ndim == 2 and mesh.mesh_dim_names is None):
        return (
            f"fully_shard takes a mesh of one dimension, or of two with names, not of {mesh.ndim} with"
            f" {mesh.mesh_dim_names or 'none'}. The way out: init_device_mesh(device, (copies, parts),"
            ' mesh_dim_names=("copy", "part")).'
        )
    return ""


def _fully_shard(units: list[Unit], mesh: DeviceMesh, options: dict[str, Any]) -> None:
    """Call `fully_shard` on each unit, the model last."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    given: set[nn.Parameter] = options.pop("ignored_params", None) or set()
    for unit in units:
        # torch does not divide a single number. A frozen one may stay whole, because it is the same everywhere.
        numbers = {parameter for parameter in unit.parameters.values() if parameter.dim() == 0}
        fully_shard(unit.module, mesh=mesh, ignored_params=given | numbers, **options)
        assert isinstance(unit.module, FSDPModule)
