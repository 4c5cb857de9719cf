"""The form in which servers of LoRA take an adapter: PEFT's config and tensors, of one rank and with a scale of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters.placement import adapter_names
from ...errors import AdapterError, ConfigError
from ...sites.site import Site
from ...variants import LoRA
from ..plain_lora import SiteFactors, plain_lora
from ..single_adapter import module_names
from .adapted_modules import check_module
from .base_model import base_fields
from .beside import PREFIX
from .form import PeftForm
from .methods import form_of
from .server_rules import SERVERS, ServerRules
from .target_modules import covering


def served_form(
    model: nn.Module, target: str, adapter: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the config and the tensors of an adapter for a server, and the names of its sites.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    if target not in SERVERS:
        raise ConfigError(f"target is one of {', '.join(map(repr, SERVERS))}, and not {target!r}.")
    rules = SERVERS[target]
    names = adapter_names(model) if adapter is None else [adapter]
    if len(names) > 1:
        raise ConfigError(
            f"{rules.name} takes one adapter at a time; the model has {', '.join(map(repr, names))}. The way out:"
            f" adapter={names[0]!r}."
        )
    kinds = ("linear", "embedding") if rules.embeddings else ("linear",)
    found = plain_lora(model, rules.name, names[0], kinds)
    modules = list(dict.fromkeys(module_names(model).values()))
    form = form_of(LoRA())
    for factors in found:
        _check(rules, form, factors.site, modules)
    rank = _rank(rules, found)
    tensors: dict[str, Tensor] = {}
    for factors in found:
        site, a, b = factors.site, factors.a, factors.b
        tensors[form.key_of("lora_A", site.name, site)] = F.pad(a, (0, 0, 0, rank - a.shape[0])).contiguous()
        tensors[form.key_of("lora_B", site.name, site)] = F.pad(b, (0, rank - b.shape[1])).contiguous()
    sites = [factors.site for factors in found]
    added = _zeros_beside(model, rules, [site.name for site in sites], modules, found[0].b.new_zeros, rank)
    targets = list(dict.fromkeys([*(site.name for site in sites), *added]))
    config = form.config_of(LoRA(r=rank, alpha=rank), sites) | {"bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
    config["target_modules"] = _targets(targets, modules)
    for name, pair in added.items():
        tensors |= {f"{PREFIX}{name}.{leaf}.weight": factor for leaf, factor in pair.items()}
    return config | base_fields(model), tensors, [site.name for site in sites]


def _check(rules: ServerRules, form: PeftForm, site: Site, modules: Sequence[str]) -> None:
    """Raise AdapterError if a server refuses or leaves out the adapter of a site, or applies it elsewhere too."""
    check_module(form, site)
    last = site.name.rpartition(".")[2]
    if site.kind.name == "embedding" and last not in rules.embeddings:
        raise AdapterError(_left_out(rules, site, f"it has embeddings called {' and '.join(sorted(rules.embeddings))}"))
    if reason := rules.leaves_out(site.name):
        raise AdapterError(_left_out(rules, site, reason))
    if not rules.by_part_of_name:
        return
    others = (name for name in modules if name != site.name and not name.startswith(f"{site.name}."))
    if other := next((name for name in others if site.name in name), None):
        raise AdapterError(
            f"{rules.name} {rules.release} applies the adapter of {site.name!r} to {other!r} too, because it finds"
            " modules by a part of their name. The way out: llfx.merge(model)."
        )


def _left_out(rules: ServerRules, site: Site, reason: str) -> str:
    return (
        f"{rules.name} {rules.release} leaves out the adapter of {site.name!r} without an error, because {reason}. The"
        " way out: exclude_names for that site, or llfx.merge(model)."
    )


def _rank(rules: ServerRules, found: Sequence[SiteFactors]) -> int:
    """Return the rank of all sites in the file: the largest, filled up to one that the server takes."""
    largest = max(found, key=lambda factors: factors.rank)
    rank = rules.rank_for(largest.rank)
    if rank is None:
        raise AdapterError(
            f"{rules.name} {rules.release} takes ranks up to {rules.ranks[-1]}, and {largest.site.name!r} has"
            f" {largest.rank}. The way out: an approximation, lora, errors = llfx.to_lora(model, r={rules.ranks[-1]})."
        )
    return rank


def _zeros_beside(
    model: nn.Module, rules: ServerRules, adapted: Sequence[str], modules: Sequence[str], zeros: Any, rank: int
) -> dict[str, dict[str, Tensor]]:
    """Return factors of zeros for modules that a server computes together with adapted ones, by their names."""
    added: dict[str, dict[str, Tensor]] = {}
    for name in adapted:
        owner, _, last = name.rpartition(".")
        group = next((group for group in rules.together if last in group), ())
        for other in (f"{owner}.{each}" for each in group if each != last):
            if other in adapted or other in added or other not in modules:
                continue
            weight = getattr(model.get_submodule(other), "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
                raise AdapterError(
                    f"{rules.name} {rules.release} computes {' and '.join(group)} as one and needs an adapter of each,"
                    f" and the shape of {other!r} is not known. The way out: adapt it too."
                )
            added[other] = {"lora_A": zeros(rank, weight.shape[1]), "lora_B": zeros(weight.shape[0], rank)}
    return added


def _targets(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the modules as a list, because servers do not read an expression."""
    found = covering(list(names), modules)
    return found if isinstance(found, list) else list(names)
