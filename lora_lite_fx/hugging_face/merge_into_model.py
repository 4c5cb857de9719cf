"""Fold adapters into the modules of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ..errors import ConfigError
from ..passes import MergedSite, merge_sites
from ..sites.finding import find_sites


def fold_into(model: Any, gm: fx.GraphModule) -> None:
    """Give the modules of `model` the weights and biases that compute what the adapters of `gm` do.

    A module reads its parameters by its own names. A tied weight is therefore untied here, where `MergeAdapters` asks
    who reads it in the graph.

    Args:
        model: the Hugging Face model of the graph, without adapters. It is changed.
        gm: the graph with adapters.

    Raises:
        ConfigError: an adapter adds a bias to a module that has no place for one.
    """
    modules = dict(model.named_modules())
    for merged in merge_sites(gm, find_sites(gm)):
        owner, name = _place_of_weight(modules, merged)
        module, site = modules[owner], merged.site
        if merged.bias is not None and site.bias is None and not isinstance(module, nn.Linear):
            raise ConfigError(
                f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
            )
        current = getattr(module, name)
        if sum(parameter is current for _, parameter in model.named_parameters(remove_duplicate=False)) > 1:
            model.config.tie_word_embeddings = False  # the other module keeps the frozen weight
            model.all_tied_weights_keys.pop(f"{owner}.{name}", None)
        module.register_parameter(name, merged.new_weight(current))
        if merged.bias is not None:
            bias_name = site.bias.rpartition(".")[2] if site.bias else "bias"
            module.register_parameter(bias_name, merged.new_bias(getattr(module, bias_name)))


def _place_of_weight(modules: dict[str, nn.Module], merged: MergedSite) -> tuple[str, str]:
    """Return the module that has the weight of a site, and the name of the weight in it."""
    if isinstance(getattr(modules.get(merged.site.name), "weight", None), Tensor):
        return merged.site.name, "weight"  # if the weight is tied, the graph may read it from another module
    owner, _, name = merged.site.weight.rpartition(".")
    return owner, name
