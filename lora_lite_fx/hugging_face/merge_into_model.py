"""Fold adapters into the modules of a model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, fx, nn

from ..adapters.placement import Placement, placements
from ..errors import ConfigError
from ..passes import merged_tensors
from ..sites.finding import find_sites


def fold_into(model: Any, gm: fx.GraphModule) -> None:
    """Give the adapted sites of a model, which is that of the graph without adapters, weights that do what these do.

    Raises:
        ConfigError: an adapter adds a bias where there is no place for one.
    """
    around: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements(gm):
        around[placement.site].append(placement)
    modules = dict(model.named_modules())
    for site in find_sites(gm):
        if site.name not in around:
            continue
        weight, bias = merged_tensors(gm, site, around[site.name])
        owner, _, name = site.weight.rpartition(".")
        if isinstance(getattr(modules.get(site.name), "weight", None), Tensor):
            owner, name = site.name, "weight"  # where it is tied, the graph reads it from another module
        module = modules[owner]
        if bias is not None and site.bias is None and not isinstance(module, nn.Linear):
            raise ConfigError(
                f"The adapter of {site.name} adds a bias, for which a {type(module).__name__} has no place."
            )
        aliases = sum(tensor is getattr(module, name) for _, tensor in model.named_parameters(remove_duplicate=False))
        if aliases > 1:
            model.config.tie_word_embeddings = False  # the other keeps the frozen weight
            model.all_tied_weights_keys.pop(f"{owner}.{name}", None)
        # Of a tensor that several sites are parts of, the other rows are as they are by now.
        stored = site.kind.stored(weight, getattr(module, name).detach())
        module.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        if bias is not None:
            place = site.bias.rpartition(".")[2] if site.bias else "bias"
            if site.bias is not None:
                bias = site.stored_bias(bias, getattr(module, place).detach())
            module.register_parameter(place, nn.Parameter(bias, requires_grad=False))
