"""The common part of reading and writing other libraries' files: one adapter, found by the modules it adapts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.contract import check_contract, finalize
from ..adapters.param_spec import ParamSpec
from ..adapters.placement import (
    Placement,
    adapter_names,
    by_config,
    graph_of,
    placements,
    refuse_banks,
    site_bias,
    site_weight,
)
from ..adapters.state import adapter_values, check_unscaled, load_adapter_values
from ..adapters.switches import known_names
from ..adapters.variant import Variant
from ..errors import CheckpointError, ConfigError
from ..log import phase
from ..rewriting.eager import AdaptedLinear
from ..rewriting.plan import Plan
from ..rewriting.rewrite import insert_adapters
from ..sites.finding import find_sites
from ..sites.site import Site
from .checkpoint import check_base


def only_adapter(
    model: nn.Module, where: str, beside: tuple[type[Variant], ...] = (), adapter: str | None = None
) -> tuple[Variant, list[Placement]]:
    """Return the adapter of a model that has one, for a file (`where`) that holds one.

    Args:
        model: an adapted model.
        where: the words for the file.
        beside: the variants that the file can hold beside it, if there are others.
        adapter: the name of the adapter; None if the model has adapters of one name.

    Raises:
        AdapterError: it has none.
        ConfigError: it has several, or none of this name.
    """
    adapter_values(model)  # refuses a model without adapters
    check_unscaled(model)
    present = known_names(model, adapter_names(model) if adapter is None else adapter)
    if len(present) > 1:
        raise ConfigError(
            f"{where} holds one adapter; the model has {', '.join(map(repr, present))}. The way out:"
            f" adapter={present[0]!r} writes one of them."
        )
    held = list(by_config(model, adapter))
    held = [adapter for adapter in held if not isinstance(adapter[0], beside)] or held
    if len(held) > 1:
        names = ", ".join(type(variant).__name__ for variant, _ in held)
        raise ConfigError(f"{where} holds one adapter; the model has {len(held)} ({names}).")
    refuse_banks(held[0][1], where)
    return held[0]


def sites_of(model: nn.Module) -> dict[str, Site]:
    """Return the adapted sites of a model by name.

    Raises:
        AdapterError: the model records an adapter at a site that its graph does not show any more.
    """
    model = graph_of(model)
    if isinstance(model, fx.GraphModule):
        return {site.name: site for site in account_for(model).adapted("saving in another format")}
    return {module.site.name: module.site for module in model.modules() if isinstance(module, AdaptedLinear)}


def module_names(model: nn.Module) -> dict[str, str]:
    """Return the qualified names of the modules of `model`, and what they are in the base: a wrapper is its base."""
    modules = dict(model.named_modules())
    in_base = {name: name for name in modules}
    in_base |= {f"{name}.base": name for name, module in modules.items() if isinstance(module, AdaptedLinear)}
    return in_base


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """Return the frozen weight `(d_out, d_in)` of a site of an adapted model."""
    model = graph_of(model)
    if isinstance(model, fx.GraphModule):
        return site_weight(model, site)
    module = model.get_submodule(site.name)
    assert isinstance(module, AdaptedLinear)
    return site.kind.matrix(module.frozen_weight().detach())


def sites_in(gm: fx.GraphModule) -> dict[str, Site]:
    """Return the sites of a graph by name."""
    with phase("found the sites") as details:
        sites = {site.name: site for site in find_sites(gm)}
        details.append(f"{len(sites)} in the model")
    return sites


def insert_from_file(
    gm: fx.GraphModule,
    sites: Mapping[str, Site],
    variant: Variant,
    by_site: Mapping[str, Mapping[str, Tensor]],
    rest: Iterable[str],
    path: Path,
    prints: Mapping[str, str] | None = None,
    check_site: Callable[[Variant, Site], None] = lambda variant, site: None,
    stacklevel: int = 5,
) -> None:
    """Insert `variant` at the sites of a file, with its values.

    Args:
        gm: the graph, which is changed if the file fits it.
        sites: its sites by name.
        variant: the config.
        by_site: the tensors of each site, by the variant's names.
        rest: names of tensors that no file of this kind holds, as they follow from the frozen weight.
        path: of the file, for messages.
        prints: the fingerprints of the weights that the adapter was made for, by site, if the file has them.
        check_site: raises `ConfigError` if the other library computes something else at a site.
        stacklevel: of a warning that the base is another, as for `warnings.warn`, seen from here.

    Raises:
        CheckpointError: the file's sites or tensors do not fit the model or the config, or the adapter means nothing
            on the model's weights.
    """
    if not by_site:
        raise CheckpointError(f"{path} holds no adapter.")
    if missing := [name for name in by_site if name not in sites]:
        raise CheckpointError(
            f"{path} adapts {len(missing)} modules that are not a linear site of the model ({', '.join(missing[:3])});"
            f" it has {', '.join(list(sites)[:3])}, ..."
        )
    targets = [site for name, site in sites.items() if name in by_site]
    try:
        variant = finalize(variant, targets, {})
        for site in targets:
            check_site(variant, site)
            local = variant.for_site(site.name)
            local.check(site)
            _check_tensors(local.tensor_specs(site), by_site[site.name], rest, f"{path}: {site.name}")
        check_contract(variant, targets, gm)  # after the sizes are known to be the file's, because it makes tensors
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if prints is not None:
        check_base(gm, [(variant, targets)], prints, path, stacklevel=stacklevel + 1)
    first = insert_adapters(gm, [Plan(variant, targets)])
    current = adapter_values(gm)
    values = dict(current)
    for placement in placements(gm):
        if placement.adapter < first:
            continue
        tensors = by_site[placement.site]
        if set(placement.names) - tensors.keys():
            site = sites[placement.site]
            placement.initialize(gm, site, site_weight(gm, site), site_bias(gm, site))
        for name, tensor in tensors.items():
            qualified = placement.tensors[name]
            values[qualified] = tensor.to(current[qualified].dtype)
    load_adapter_values(gm, values)


def _check_tensors(
    specs: Mapping[str, ParamSpec], tensors: Mapping[str, Tensor], rest: Iterable[str], where: str
) -> None:
    """Raise `CheckpointError` unless the tensors that a file has for a site are those that its config asks for.

    Before any is made: a config may ask for more than there is memory.
    """
    if lacking := specs.keys() - tensors.keys() - set(rest):
        raise CheckpointError(f"{where} lacks {', '.join(sorted(lacking))}.")
    if foreign := tensors.keys() - specs.keys():
        raise CheckpointError(f"{where} has {', '.join(sorted(foreign))}, against its config.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != specs[name].shape:
            raise CheckpointError(
                f"{where} has {name} of shape {tuple(tensor.shape)}; its config asks for {specs[name].shape}."
            )
        wanted = specs[name].dtype
        if wanted is not None and not wanted.is_floating_point:
            if tensor.dtype != wanted:
                raise CheckpointError(f"{where} has {name} in {tensor.dtype}; its config asks for {wanted}.")
        elif not tensor.is_floating_point():
            raise CheckpointError(f"{where} has {name} in {tensor.dtype}, which is not a floating-point type.")
