"""What the files of other libraries are written from: one adapter, its sites and their frozen weights."""

from __future__ import annotations

from torch import Tensor, fx, nn

from ..adapters.accounting import account_for
from ..adapters.placement import Placement, adapter_names, by_config, graph_of, refuse_banks, site_weight
from ..adapters.state import adapter_tensors, check_unscaled
from ..adapters.switches import known_names
from ..adapters.variant import Variant
from ..errors import ConfigError
from ..rewriting.adapted_linear import AdaptedLinear
from ..sites.site import Site


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
    adapter_tensors(model)  # refuses a model without adapters
    check_unscaled(model)
    present = known_names(model, adapter_names(model) if adapter is None else adapter)
    if len(present) > 1:
        raise ConfigError(
            f"{where} holds one adapter; the model has {', '.join(map(repr, present))}. The way out:"
            f" adapter={present[0]!r} writes one of them."
        )
    every = list(by_config(model, adapter))
    held = [(variant, placed) for variant, placed in every if not isinstance(variant, beside)] or every
    if len(held) > 1:
        names = ", ".join(type(variant).__name__ for variant, _ in held)
        message = f"{where} holds one config; the model has {len(held)} ({names})."
        if len({type(variant) for variant, _ in held}) == 1:
            message += " The way out: one config for all their sites, with their kinds in target_kinds."
        raise ConfigError(message)
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
