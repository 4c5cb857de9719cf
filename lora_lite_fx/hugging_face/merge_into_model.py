"""Fold adapters into the modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapters.placement import site_bias, site_weight
from ..errors import ConfigError
from ..passes import MergedSite, merge_sites
from ..sites.finding import find_sites
from ..sites.site import Site


def fold_into(model: Any, gm: fx.GraphModule, coefficients: Mapping[str, float] | None) -> None:
    """Give the modules of `model` the weights and biases that compute what the adapters of `gm` do.

    A module reads its parameters by its own names. A tied weight is therefore untied here, where `MergeAdapters` asks
    who reads it in the graph.

    Args:
        model: the Hugging Face model of the graph, without adapters. It is changed.
        gm: the graph with adapters.
        coefficients: as for `merge_sites`.

    Raises:
        ConfigError: an adapter adds a bias to a module that has no place for one, or changes a weight or bias that the
            model computes.
    """
    modules = dict(model.named_modules())
    for merged in merge_sites(gm, find_sites(gm), coefficients):
        owner, name = _place_of_weight(modules, merged)
        module, site = modules[owner], merged.site
        change_weight = site.computed_weight is None or not torch.equal(merged.weight, site_weight(gm, site))
        change_bias = merged.bias is not None and not _is_kept(gm, merged)
        if change_bias and site.bias is None and not isinstance(module, nn.Linear):
            raise ConfigError(
                f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
            )
        if change_weight:
            if site.computed_weight is not None:
                _drop_parametrization(module, name, site)
            current = getattr(module, name)
            if sum(parameter is current for _, parameter in model.named_parameters(remove_duplicate=False)) > 1:
                model.config.tie_word_embeddings = False  # the other module keeps the frozen weight
                model.all_tied_weights_keys.pop(f"{owner}.{name}", None)
            module.register_parameter(name, merged.new_weight(current))
        if change_bias:
            bias_name = site.bias.rpartition(".")[2] if site.bias else "bias"
            module.register_parameter(bias_name, merged.new_bias(getattr(module, bias_name)))


def _is_kept(gm: fx.GraphModule, merged: MergedSite) -> bool:
    """Return whether a site keeps the bias that the model computes, because the adapters do not change it.

    Raises:
        ConfigError: they change it.
    """
    bias = site_bias(gm, merged.site) if merged.site.computed_bias is not None else None
    if bias is None or merged.bias is None:
        return False
    if not torch.equal(merged.bias, bias):
        raise _computes("bias", merged.site)
    return True


def _drop_parametrization(module: nn.Module, name: str, site: Site) -> None:
    """Give `module` an ordinary parameter in place of the parametrization that computes it.

    Raises:
        ConfigError: the tensor is computed in another way.
    """
    if not is_parametrized(module, name) or len(list(module.parametrizations.children())) > 1:  # type: ignore[union-attr]
        raise _computes("weight", site)
    value = getattr(module, name)
    # Not remove_parametrizations, because it deletes the property from the class, which the user's model has too.
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _computes(tensor: str, site: Site) -> ConfigError:
    """Return the error for adapters that change a tensor which the model's code computes and would not read again."""
    return ConfigError(
        f"The model computes the {tensor} of {site.name}, and its adapters change it, so that they cannot be folded"
        " into the model. The way out: llfx.merge of a rewritten graph."
    )


def _place_of_weight(modules: dict[str, nn.Module], merged: MergedSite) -> tuple[str, str]:
    """Return the module that has the weight of a site, and the name of the weight in it."""
    if isinstance(getattr(modules.get(merged.site.name), "weight", None), Tensor):
        return merged.site.name, "weight"  # if the weight is tied, the graph may read it from another module
    owner, _, name = merged.site.weight.rpartition(".")
    return owner, name
