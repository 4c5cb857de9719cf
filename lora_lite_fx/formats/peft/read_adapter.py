"""Read an adapter in the form in which PEFT has it: first without a model, then at the sites of a graph."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...sites.site import Site
from ..base_fingerprints import check_base
from ..filed_adapter import FiledAdapter, Fitting
from .adapted_modules import PeftModule, modules_at_sites
from .base_model import compare_names
from .beside import fit_beside
from .form import PeftAdapter, check_site
from .peft_config import form_of_config, read_config
from .target_modules import exactly


def read_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config_path: Path,
    path: Path,
    prints: Mapping[str, str] | None = None,
) -> PeftAdapter:
    """Read and check an adapter without a model.

    Args:
        config: as of an `adapter_config.json`.
        tensors: by PEFT's keys.
        config_path, path: of the config and of the tensors, for messages.
        prints: the fingerprints of the weights that the adapter was made for, by site, if they are known.

    Raises:
        CheckpointError: the adapter cannot be represented.

    Warns:
        UserWarning: PEFT trained it otherwise, or on a base that the file does not tell of.
    """
    try:
        form = form_of_config(config)
        variant = read_config(form, config, new=False)
    except ConfigError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    adapter = form.read(PeftAdapter(form, config, variant, tensors, path, prints))
    for message in form.warnings_of(config):
        warnings.warn(f"{form.name}: {message}", stacklevel=4)
    if adapter.fields.are_tied(config, form.name):
        warnings.warn(
            f"{form.name}: PEFT trained one adapter for the embedding and the head (ensure_weight_tying). Here they are"
            " two, with the same values as long as they are not trained on.",
            stacklevel=4,
        )
    return adapter


def adapters_at_sites(gm: fx.GraphModule, adapter: PeftAdapter) -> list[FiledAdapter]:
    """Return an adapter, and what trains beside it, at the sites of a graph.

    Raises:
        CheckpointError: they do not fit the graph.

    Warns:
        UserWarning: the base is another, or is called otherwise; or a module trains otherwise than in PEFT.
    """
    prints, fitting = adapter.prints, Fitting(gm, adapter.path)
    if prints is None:
        compare_names(gm, adapter.config, adapter.path)
    fit_beside(fitting, adapter.beside, adapter.fields)
    if not adapter.form.beside_only:
        modules = modules_at_sites(fitting, adapter.modules, adapter.config.get("target_parameters") or ())
        if prints is not None:  # zeros may fill up an attention module, see `adapted_modules.py`
            modules = {site: module for site, module in modules.items() if site in prints or not module.is_empty}
        _fit(fitting, adapter, modules)
    if not fitting.adapters:
        raise CheckpointError(f"{adapter.path} holds no adapter.")
    if prints is not None:
        check_base(gm, [each.plan for each in fitting.adapters], prints, adapter.path, stacklevel=4)
    return fitting.adapters


def _fit(fitting: Fitting, adapter: PeftAdapter, modules: Mapping[str, PeftModule]) -> None:
    try:
        variant = _with_names_of_sites(adapter.variant, modules)
        for module in modules.values():
            for site in () if module.is_parameter else module.sites:
                check_site(adapter.form, variant, site)
    except ConfigError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from error
    fitting.add(variant, {site: module.tensors for site, module in modules.items()}, adapter.form.rest)


def _with_names_of_sites(variant: Variant, modules: Mapping[str, PeftModule]) -> Variant:
    """Return the config with targets, ranks and alphas that name sites, where PEFT's name other things."""
    sites = [site for module in modules.values() for site in module.sites]
    if not all(_selects(variant, site) for site in sites):
        kinds = tuple(dict.fromkeys(site.kind.name for site in sites))
        variant = dataclasses.replace(variant, target_names=exactly(modules), target_kinds=kinds)
    for field, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        theirs = {name: variant.overrides(module.name).get(field) for name, module in modules.items()}
        ours = {
            name: value
            for name, value in theirs.items()
            if value is not None and variant.overrides(name).get(field) != value
        }
        if ours:
            others = ((f"^{re.escape(name)}$", value) for name, value in ours.items())
            change: dict[str, Any] = {pattern: (*others, *getattr(variant, pattern))}
            variant = dataclasses.replace(variant, **change)
    return variant


def _selects(variant: Variant, site: Site) -> bool:
    try:
        return variant.selects(site)
    except ConfigError:  # a pattern takes too long, and the names of the tensors say the same
        return False
