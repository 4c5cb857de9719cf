"""Read what PEFT has: a config; and an adapter, first without a model, then at the sites of a graph."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from ...adapters.named_configs import reads_peft_configs
from ...adapters.variant import Variant
from ...errors import CheckpointError, ConfigError
from ...sites.site import Site
from ..base_fingerprints import check_base
from ..filed_adapter import FiledAdapter, Fitting
from .adapted_modules import PeftModule, modules_at_sites
from .base_model import compare_names, source_of
from .beside import BesideFields, fit_beside
from .form import PeftAdapter, check_site
from .methods import form_of_config
from .target_modules import exactly, with_targets_of


@reads_peft_configs
def from_peft_config(config: Mapping[str, Any] | Any, model: nn.Module | None = None) -> Variant | list[Variant]:
    """Return the variant that a PEFT config describes, with its targets as patterns of names.

    `rewrite`, `wrap`, `adapt` and `add` call this for the configs of PEFT that they are given.

    Args:
        config: a `PeftConfig`, or the content of an `adapter_config.json`.
        model: the model to adapt, whose modules `target_modules="all-linear"` and PEFT's default targets (None) name;
            or a graph that remembers it.

    Returns:
        The config of the adapter. If PEFT trains whole modules or biases beside it (`modules_to_save`, `bias`, the head
        of a classifier), a list: those as `Full`, and the adapter last.

    Raises:
        ConfigError: it asks for something that cannot be represented here, or for a start that no new adapter has
            here; the message says what.
    """
    with _refusing_other_values():
        fields = dict(config if isinstance(config, Mapping) else config.to_dict())
        form = form_of_config(fields)
    if model is not None:
        fields = with_targets_of(fields, form.default_tables(), source_of(model) or model)
    with _refusing_other_values():
        variant = form.variant_of(fields, new=True)
    beside = BesideFields.of(fields, form.name).configs(variant)
    return [*beside, variant] if beside else variant


@contextmanager
def _refusing_other_values() -> Iterator[None]:
    try:
        yield
    except (AttributeError, RecursionError) as error:
        raise ConfigError(f"It is not a config of PEFT: {error}.") from error


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
        with _refusing_other_values():
            form = form_of_config(config)
            variant = form.variant_of(config, new=False)
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
