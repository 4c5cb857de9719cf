"""`reconfigure`: change what an adapter computes with the values that it has, such as its `alpha`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..adapters.placement import HasGraphs, Placement, copy_over_tensors, graph_of, placements
from ..adapters.state import adapter_tensors
from ..adapters.switches import HasSwitches, known_names
from ..adapters.variant import Variant
from ..errors import ConfigError
from ..graph.tensors import outside_inference_mode, tensor_of
from ..sites.finding import find_sites
from ..sites.site import Site
from .adapted_linear import AdaptedLinear
from .rewrite import insert_placed, remove

PLACE_FIELDS = frozenset(field.name for field in dataclasses.fields(Variant))
"""The fields that say where adapters are and of which type their tensors are."""


@outside_inference_mode()
def reconfigure(model: nn.Module, adapter: int | str | None = None, **changes: Any) -> Any:
    """Return the model with other values of fields in the config of an adapter: `reconfigure(gm, alpha=32)`.

    The tensors stay what they are, the same objects, so that an optimizer goes on. A field that would change a shape or
    the sites is refused. Fields that only say how tensors start have no effect any more.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`; it is not changed, and shares all its tensors.
        adapter: the name of the adapter; or the index of a config, as in `adapters(model)`. It may be left out if there
            is one.
        changes: the fields with their new values. Patterns still count: `alpha=32` leaves the sites alone that
            `alpha_pattern` gives one.

    Returns:
        A model of the same kind, in the same mode. Files that `save` writes have the new config.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: there are several adapters and none is chosen; a field does not exist, has an impossible value,
            says where the adapter is, or changes a tensor; or nothing changes at any site. The message says which.
    """
    adapter_tensors(model)
    placed = placements(model)
    indices = sorted({placement.adapter for placement in placed})
    if isinstance(adapter, str):
        (name,) = known_names(model, adapter)
        indices = sorted({placement.adapter for placement in placed if placement.adapter_name == name})
    index = indices[0] if not isinstance(adapter, int) and len(indices) == 1 else adapter
    if index not in indices:
        known = ", ".join(map(str, indices))
        whose = f"Adapter {adapter!r}" if isinstance(adapter, str) else "The model"
        raise ConfigError(
            f"{whose} has the configs {known}; choose one of them: reconfigure(model, {indices[-1]}, {_list(changes)})."
        )
    members = [placement for placement in placed if placement.adapter == index]
    old = members[0].variant
    new = _changed(old, changes)
    if all(new.for_site(member.site) == old.for_site(member.site) for member in members):
        raise ConfigError(f"{type(old).__name__}: {_list(changes)} changes nothing at any site of adapter {index}.")
    graph = graph_of(model)
    base = remove(graph) if isinstance(graph, fx.GraphModule) else None  # which shows roles that adapters may hide
    sites = _wrapped_sites(model) if base is None else {site.name: site for site in find_sites(base)}
    for member in members:
        _check_tensors(old, new, sites[member.site], _list(changes))
    after = [replace(member, variant=new) if member.adapter == index else member for member in placed]
    if isinstance(model, HasGraphs):
        return model.with_placements(after)
    return _with_placements(model, after) if base is None else _inserted(base, model, after, sites)


def _inserted(
    base: fx.GraphModule, model: nn.Module, placed: Sequence[Placement], sites: Mapping[str, Site]
) -> fx.GraphModule:
    """Insert adapters into `base`, over the tensors of `model`."""
    tensors = {name: tensor_of(model, name) for placement in placed for name in placement.tensors.values()}
    roles = {name: site.roles for name, site in sites.items()}
    insert_placed(base, placed, roles, tensors)
    if isinstance(base, HasSwitches) and isinstance(model, HasSwitches):
        base.switches = model.switches
    return base


def _with_placements(wrapped: nn.Module, placed: Sequence[Placement]) -> nn.Module:
    """Return a copy of an eagerly wrapped model over the same tensors, with these adapters."""
    copied: nn.Module = copy_over_tensors(wrapped)
    for module in copied.modules():
        if isinstance(module, AdaptedLinear):
            own = {placement.adapter: placement for placement in placed if placement.site == module.site.name}
            module.placements = [own[placement.adapter] for placement in module.placements]
    return copied


def _wrapped_sites(wrapped: nn.Module) -> dict[str, Site]:
    return {module.site.name: module.site for module in wrapped.modules() if isinstance(module, AdaptedLinear)}


def _changed(old: Variant, changes: dict[str, Any]) -> Variant:
    """Return the config with these changes."""
    name = type(old).__name__
    fields = {field.name for field in dataclasses.fields(old)}
    for field in changes:
        if field in PLACE_FIELDS:
            raise ConfigError(
                f"{name}: {field} says where an adapter is or of which type, and its tensors are there already. The"
                " way out: rewrite(remove(model), cfg) makes a new adapter."
            )
        if field not in fields:
            raise ConfigError(f"{name} has no field {field!r}; it has {', '.join(sorted(fields - PLACE_FIELDS))}.")
    if not changes:
        raise ConfigError("reconfigure takes the fields to change: reconfigure(model, alpha=32).")
    return replace(old, **changes)


def _check_tensors(old: Variant, new: Variant, site: Site, changes: str) -> None:
    """Check that the changed config asks for the tensors at `site` that are there.

    Raises:
        ConfigError: it does not.
    """
    new.for_site(site.name).check(site)
    present, wanted = (_tensors(variant, site) for variant in (old, new))
    for name in dict.fromkeys((*present, *wanted)):
        if present.get(name) != wanted.get(name):
            raise ConfigError(
                f"{type(new).__name__}: {changes} makes {name} at {site.name!r} {wanted.get(name, 'go')} in place of"
                f" {present.get(name, 'nothing')}, so that its values cannot stay. The way out: rewrite(remove(model),"
                " cfg) makes a new adapter."
            )


def _tensors(variant: Variant, site: Site) -> dict[str, str]:
    """Return the tensors that `variant` adds to `site`, in words."""
    specs = variant.for_site(site.name).tensor_specs(site)
    return {name: f"{spec.shape}, {'trained' if spec.trainable else 'frozen'}" for name, spec in specs.items()}


def _list(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())
