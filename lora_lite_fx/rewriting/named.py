"""`add` and `delete`: change which adapters a model has, in place.

Each works on a copy of the graph first, and lets the model take over the copy when it is finished. So a call that fails
changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from ..adapters.named_configs import AdapterConfig, as_adapters, check_free
from ..adapters.placement import HasGraphs, Placement, adapter_names, adapter_tensor_names, next_index, placements
from ..adapters.state import adapter_tensors
from ..adapters.switches import HasSwitches, known_names
from ..errors import AdapterError, ConfigError, shown
from ..execution.adapted_graph_module import AdaptedGraphModule
from ..execution.optimize import draft_of
from ..graph.sharded import refuse_sharded
from ..graph.tensors import delete_tensor, outside_inference_mode, tensor_of
from ..passes import Pipeline, RemoveAdapters
from .adapted_linear import AdaptedLinear
from .choose_sites import Batches, check_calibration, choose_sites
from .rewrite import insert_new, insert_placed


@outside_inference_mode()
def add(model: nn.Module, adapters: Mapping[str, AdapterConfig], *, calibration: Batches | None = None) -> None:
    """Add named adapters to a model, in place: `add(gm, {"it": LoRA(r=8)})`.

    What the model computes stays: the new adapters act when `active` names them. Its other tensors are the same objects
    as before, so that an optimizer goes on.

    Args:
        model: a result of `rewrite`, `adapt`, `load` or `capture`.
        adapters: the configs by name, as for `rewrite`.
        calibration: as for `rewrite`.

    Raises:
        ConfigError: a name is taken or cannot be one; or as `rewrite`.
        SelectionError: a config's targets match no site.
        AdapterError: the model is one that `wrap` or `backend` made, or a graph of others.
    """
    if not isinstance(adapters, Mapping):
        raise ConfigError(f"add takes adapters by name, as in add(model, {{'it': LoRA(r=8)}}), not {shown(adapters)}.")
    chosen = as_adapters(adapters, model)
    check_calibration(calibration)
    check_free(adapters, adapter_names(model) if isinstance(model, nn.Module) else [])
    if not isinstance(model, (HasGraphs, AdaptedGraphModule)):
        raise AdapterError(
            f"add takes a graph or a model that rewrite, load, capture or adapt returned, not {shown(model)}. The way"
            " out: give wrap or backend all adapters at once, by name."
        )
    refuse_sharded(model, "add cannot change a model", "add all adapters before fully_shard")
    acting = acting_now(model)
    if isinstance(model, HasGraphs):
        model.add_to_graphs(chosen, calibration)
    else:
        draft = draft_of(model)
        insert_new(draft, choose_sites(draft, chosen, calibration))
        model.take_over(draft)
    act_as_before(model, acting)


def delete(model: nn.Module, names: str | Sequence[str]) -> None:
    """Delete adapters of a model, in place, with their tensors.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        names: the name of one adapter, or several.

    Raises:
        AdapterError: the model has no adapters; or it is a copy that carries its adapters for `torch.compile`.
        ConfigError: it has no adapter of such a name; or none would be left.

    Warns:
        UserWarning: no adapter acts any more.
    """
    adapter_tensors(model)  # refuses a model without adapters, and says what to pass instead
    refuse_sharded(model, "delete cannot change a model", "active(model, others) lets an adapter not act")
    gone = known_names(model, names)
    left = [name for name in adapter_names(model) if name not in gone]
    if not left:
        raise ConfigError("No adapter would be left. The way out: remove(model) returns the model without adapters.")
    if isinstance(model, HasGraphs):
        model.delete_from_graphs(gone)
    elif isinstance(model, AdaptedGraphModule):
        draft = draft_of(model)
        Pipeline((RemoveAdapters(tuple(gone)),)).run(draft)
        model.take_over(draft)
    else:
        _delete_from_modules(model, gone)
    if isinstance(model, HasSwitches):
        switches = model.switches
        acting = None if switches.acting is None else tuple(name for name in switches.acting if name in left)
        scales = {name: scale for name, scale in switches.scales.items() if name in left}
        model.switches = replace(switches, acting=acting, scales=scales)
        if acting == () != switches.acting:
            warnings.warn(
                f"The adapters that acted were deleted, so that none acts now. active(model, {left[0]!r}) lets another"
                " one act.",
                stacklevel=2,
            )


def _delete_from_modules(model: nn.Module, names: Sequence[str]) -> None:
    wrapped = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    if not wrapped:
        raise AdapterError(
            f"{type(model).__name__} carries its adapters for torch.compile, whose code has them. The way out: active"
            " switches them off; or make the model anew with the other adapters."
        )
    for name in [name for gone in names for name in adapter_tensor_names(model, gone)]:
        delete_tensor(model, name)
    for module in wrapped:
        module.placements = [placement for placement in module.placements if placement.adapter_name not in names]


def acting_now(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the adapters that act; None for a model that has none yet."""
    names = adapter_names(model)
    return tuple(filter(model.switches.acts, names)) if names and isinstance(model, HasSwitches) else None


def act_as_before(model: nn.Module, acting: tuple[str, ...] | None) -> None:
    """Let these adapters act, and not those that were added since; all if there was none before."""
    if acting is not None and isinstance(model, HasSwitches):
        model.switches = replace(model.switches, acting=acting)


def as_named(loaded: fx.GraphModule, name: str, first: int) -> tuple[list[Placement], dict[str, Tensor]]:
    """Return the placements and the tensors that the one adapter of a graph has under another name.

    Args:
        loaded: the graph.
        name: the new name.
        first: the index of the first config in the model that gets the adapter.

    Raises:
        ConfigError: the graph has adapters of several names.
    """
    if len(present := adapter_names(loaded)) > 1:
        raise ConfigError(
            f"There are the adapters {', '.join(map(repr, present))}, and name={name!r} names one. The way out:"
            f" adapter={present[0]!r} takes one of them."
        )
    placed: list[Placement] = []
    tensors: dict[str, Tensor] = {}
    for old in placements(loaded):
        new = replace(old, adapter=first + old.adapter, adapter_name=name)
        placed.append(new)
        tensors |= {new.tensors[own]: tensor_of(loaded, path) for own, path in old.tensors.items()}
    return placed, tensors


def insert_from(model: nn.Module, loaded: fx.GraphModule, name: str) -> None:
    """Insert the one adapter of another graph of the model into the model, in place. What acts stays as it is.

    Args:
        model: a graph of this library, or a model that runs such graphs.
        loaded, name: as for `as_named`.
    """
    acting = acting_now(model)
    if isinstance(model, HasGraphs):
        model.insert_from(loaded, name)
    else:
        assert isinstance(model, AdaptedGraphModule)
        draft = draft_of(model)
        placed, tensors = as_named(loaded, name, next_index(draft))
        insert_placed(draft, placed, {}, tensors)
        model.take_over(draft)
    act_as_before(model, acting)
