"""Write an adapter in the form in which PEFT has it: its config, and its tensors by PEFT's keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...adapters.placement import Placement, adapter_names, placements
from ...adapters.state import adapter_values
from ...adapters.variant import Variant
from ...errors import ConfigError
from ...rewriting.sums import to_lora
from ...variants import LoRA
from ..single_adapter import module_names, only_adapter, sites_of
from .adapted_modules import PeftModule, peft_modules
from .base_model import base_fields
from .beside import BESIDE
from .beside_written import placements_beside, trains_beside_only, write_beside
from .form import PeftForm, check_site
from .methods import form_of
from .methods.peft_tuned_weights import as_method
from .target_modules import covering


def written_form(
    model: nn.Module, as_lora: bool | None, adapter: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the config and the tensors of an adapter of `model`, as PEFT writes them, and the names of its sites.

    Raises:
        AdapterError, ConfigError: as for `save_peft`.
    """
    names = list(dict.fromkeys(module_names(model).values()))
    beside = [placement.site for placement in placements_beside(model, adapter)]
    if trains_beside_only(model, adapter):
        config, tensors = as_method(*write_beside(model, sites_of(model), (), names, adapter), names)
        return config | base_fields(model), _to_write(tensors), beside
    placed, variant, state = _as_written(model, as_lora, adapter)
    form, sites = form_of(variant), sites_of(model)
    modules = peft_modules(model, form, variant, placed, sites, state)
    fields, tensors = write_beside(model, sites, modules, names, adapter)
    for module in modules:
        site = module.sites[0]
        for name, tensor in module.tensors.items():
            if name in form.tensors:
                in_peft = form.tensor_to_peft(variant, site, name, tensor)
                tensors[form.key_of(name, module.path, site)] = in_peft
    config = _config_of(form, variant, modules, names) | base_fields(model) | fields
    return config, _to_write(form.filed(variant, tensors)), [*(placement.site for placement in placed), *beside]


def _to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}


def _as_written(
    model: nn.Module, as_lora: bool | None, adapter: str | None
) -> tuple[Sequence[Placement], Variant, Mapping[str, Tensor]]:
    """Return the placements of the model's one adapter, and its config and tensors as they are written.

    Raises:
        AdapterError: the model has no adapters.
        ConfigError: it has several, or they cannot be represented.
    """
    variant, placed = only_adapter(model, "A PEFT directory", beside=BESIDE, adapter=adapter)
    state = adapter_values(model)
    form = form_of(variant)  # refuses a class of the user's own, which may compute something else than its parent
    if as_lora is not False and (lora := form.as_lora(placed, state)) is not None:
        return placed, *lora
    if as_lora and type(variant) is not LoRA:
        return _converted(model, variant, adapter)
    return placed, *form.as_written(model, variant, placed, state)


def _converted(
    model: nn.Module, variant: Variant, adapter: str | None
) -> tuple[Sequence[Placement], Variant, Mapping[str, Tensor]]:
    """Return an adapter of any variant as `LoRA`, exactly."""
    if beside := placements_beside(model, adapter):
        raise ConfigError(
            f"as_lora: the adapter trains {beside[0].site!r} whole beside {type(variant).__name__}. The way out: write"
            " it without as_lora, or give the two names of their own."
        )
    lora, _ = to_lora(model, adapter=adapter or adapter_names(model)[0])
    placed = placements(lora)
    state = adapter_values(lora)
    sites = sites_of(lora)
    for placement in placed:
        rank, site = len(state[placement.tensors["lora_A"]]), sites[placement.site]
        if 2 * rank > min(site.d_in, site.d_out):
            raise ConfigError(
                f"as_lora: {type(variant).__name__} changes {placement.site!r} by a matrix of rank {rank}, which is"
                " not smaller than half the weight. The way out: an approximation,"
                " lora, errors = llfx.to_lora(model, r=16), and save_peft(lora, path)."
            )
    return placed, placed[0].variant, state


def _config_of(form: PeftForm, variant: Variant, modules: Sequence[PeftModule], names: Iterable[str]) -> dict[str, Any]:
    """Return the config of `variant` in these modules of a model whose modules have these names.

    It lacks the fields that name the base, see `base_fields`.

    Raises:
        ConfigError: it cannot be represented.
    """
    sites = [site for module in modules if not module.is_parameter for site in module.sites]
    for site in sites:
        check_site(form, variant, site)
    config = form.config_of(variant, sites)
    targets = dict.fromkeys(module.name for module in modules if not module.is_parameter)
    config["target_modules"] = covering(list(targets), names) if targets else []
    if parameters := sorted(module.name for module in modules if module.is_parameter):
        config["target_parameters"] = parameters
    for key in sorted(form.patterns | {"rank_pattern", "alpha_pattern"}):
        others = _values_by_name(form.name, key, modules)
        if key in form.patterns:
            config[key] = others
        elif others:
            raise ConfigError(
                f"{form.name}: PEFT has one {_field_of(key)} for all sites, and this adapter has several."
            )
    return config


def _field_of(key: str) -> str:
    return {"rank_pattern": "r", "alpha_pattern": "alpha"}.get(key, key.removesuffix("_pattern"))


def _values_by_name(name: str, key: str, modules: Sequence[PeftModule]) -> dict[str, Any]:
    """Return the values of a field at the modules that have another than the config, by the patterns of their names."""
    field = _field_of(key)
    values = {module.name: module.overrides[field] for module in modules if field in module.overrides}
    if key in ("rank_pattern", "alpha_pattern"):
        return {f"^{re.escape(module)}": value for module, value in values.items()}
    # PEFT puts a dot before the patterns of its own fields, and takes names that are there in full.
    if any(module.name.endswith(f".{other}") for module in modules for other in values):
        raise ConfigError(f"{name}: PEFT would take a {field} for all modules whose names end alike.")
    return values
