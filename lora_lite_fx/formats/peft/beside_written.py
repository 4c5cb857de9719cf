"""Write what a model trains beside its adapter, `Full` and `TrainableTokens`, into a PEFT directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...adapters.placement import Placement, adapter_tensor_names, by_config
from ...adapters.state import adapter_values
from ...adapters.variant import as_tuple
from ...errors import ConfigError
from ...sites.site import Site
from ...variants import TrainableTokens
from ..single_adapter import module_names
from .adapted_modules import PeftModule
from .beside import BASE, BESIDE, PREFIX, TOKENS


def placements_beside(model: nn.Module, adapter: str | None) -> list[Placement]:
    """Return the places of the whole tensors that a model trains; of the adapter of one name if that is given."""
    configs = by_config(model, adapter)
    return [placement for variant, members in configs if isinstance(variant, BESIDE) for placement in members]


def trains_beside_only(model: nn.Module, adapter: str | None) -> bool:
    """Return whether a model, or its adapter of this name, trains whole tensors and nothing else."""
    held = list(by_config(model, adapter))
    return bool(held) and all(isinstance(variant, BESIDE) for variant, _ in held)


def write_beside(
    model: nn.Module,
    sites: Mapping[str, Site],
    modules: Sequence[PeftModule],
    names: Collection[str],
    adapter: str | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of the config for the whole tensors of `model`, and the tensors by PEFT's keys.

    Args:
        model: an adapted model.
        sites: its adapted sites by name.
        modules: those that hold the adapter beside them; none if there is not one.
        names: of the model's modules.
        adapter: the name of the adapter; None if there is one.

    Raises:
        ConfigError: PEFT cannot hold them; the message says why.
    """
    state = adapter_values(model)
    known_by_end = names if modules else ()  # without an adapter, a module is named in full
    adapted = {site.name for module in modules for site in module.sites}
    tensors: dict[str, Tensor] = {}
    saved: list[str] = []
    biases: set[str] = set()
    tokens: dict[str, list[int]] = {}
    for placement in placements_beside(model, adapter):
        site, name = sites[placement.site], placement.site
        _check_module(site, modules, names)
        if isinstance(placement.variant, TrainableTokens):
            if site.kind.token_dim == 1 or not site.tied:  # PEFT finds what is tied to it
                _check_saved(site, adapted, known_by_end)
                tokens[name] = list(as_tuple(placement.variant.token_indices))
                tensors[f"{PREFIX}{name}{TOKENS}"] = state[placement.tensors["lora_shared_tokens"]]
            continue
        own = {leaf.removeprefix("lora_"): state[path] for leaf, path in placement.tensors.items()}
        if "weight" in own:
            if site.bias is not None and "bias" not in own:
                raise ConfigError(f"Full: PEFT saves whole modules, and at {name!r} the weight alone is trained.")
            _check_saved(site, adapted, known_by_end)
            saved.append(name)
        else:
            biases.add(name)
        between = BASE if name in adapted else "."
        tensors |= {f"{PREFIX}{name}{between}{leaf}": tensor for leaf, tensor in own.items()}
    named = {"modules_to_save": sorted(saved), "trainable_token_indices": tokens}
    fields: dict[str, Any] = {field: value for field, value in named.items() if value}
    if biases:
        fields["bias"] = _biases(model, biases, sites, adapted, adapter)
    return fields, tensors


def _check_module(site: Site, modules: Sequence[PeftModule], names: Collection[str]) -> None:
    """Check that PEFT can train tensors of `site` by the name of its module."""
    name = site.name
    if name not in names or not site.weight.startswith(f"{name}."):
        raise ConfigError(f"PEFT trains whole modules or parts of them, and site {name!r} is not a module of its own.")
    if around := [module.name for module in modules if name.startswith(f"{module.name}.")]:
        raise ConfigError(f"PEFT adapts all of {around[0]!r}, and trains nothing in it beside that, such as {name!r}.")


def _check_saved(site: Site, adapted: Collection[str], names: Collection[str]) -> None:
    """Check that PEFT can train the module of `site` in part or whole, and no other by its name."""
    name = site.name
    if name in adapted:
        raise ConfigError(f"PEFT trains {name!r} whole or adapts it, not both.")
    if alike := [module for module in names if module.endswith(name) and module != name]:
        raise ConfigError(f"PEFT cannot name {name!r} as a module to train without {alike[0]!r}.")


def _biases(
    model: nn.Module, biases: set[str], sites: Mapping[str, Site], adapted: Collection[str], adapter: str | None
) -> str:
    """Return PEFT's word for these biases, given by the names of their sites."""
    own = {*adapter_tensor_names(model)}
    in_base = module_names(model)
    names = {name for name, _ in model.named_parameters() if name.endswith("bias") and name not in own}
    every = {in_base[name.rpartition(".")[0]] for name in names}
    if every <= {placement.site for placement in placements_beside(model, adapter)}:
        return "all"
    if biases == {name for name in adapted if sites[name].bias is not None}:
        return "lora_only"
    raise ConfigError(
        f"Full: PEFT trains all biases of a model or those of the adapted modules, and here it is {len(biases)} of"
        f" {len(every)}."
    )
