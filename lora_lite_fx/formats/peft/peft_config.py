"""PEFT's configs to ours, and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...adapters.patterns import occurs
from ...adapters.variant import Variant
from ...errors import ConfigError
from ...variants import EVA, IA3
from .adapted_modules import PeftModule
from .beside import FIELDS, TIED, WholeFields
from .default_targets import with_targets_of
from .form import PeftFormat
from .sites import check_site
from .target_modules import START, covering, listed, name_patterns, target_patterns, with_flags_inside
from .variants import FORMATS, format_of
from .whole_only import WHOLE_ONLY, method_of, own_fields, whole_config

# Fields that say where an adapter comes from, or how PEFT is to run it.
_UNREAD = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_TARGETS = frozenset(
    {
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "feedforward_modules",
    }
)
_PLAIN_STARTS = ("gaussian", "orthogonal", "mica")
"""Starts of a LoRA that leave the base as it is, so that the file is that of any LoRA."""
_STARTS_ON_ANOTHER_BASE = ("lora_ga", "corda")
"""Starts for which PEFT changes the base in memory. The file is that of a LoRA on the changed base."""


def from_peft_config(config: Mapping[str, Any] | Any, model: nn.Module | None = None) -> Variant | list[Variant]:
    """Return the variant that a PEFT config describes, with its targets as patterns of names.

    Args:
        config: a `PeftConfig`, or the content of an `adapter_config.json`.
        model: the model to adapt, whose modules `target_modules="all-linear"` and PEFT's default targets (None) name.

    Returns:
        The config of the adapter. If PEFT trains whole modules or biases beside it (`modules_to_save`, `bias`, the head
        of a classifier), a list: those as `Full`, and the adapter last.

    Raises:
        ConfigError: it asks for something that cannot be represented here, or for a start that no new adapter has
            here; the message says what.
    """
    fields = as_dict(config)
    if model is not None:
        fields = with_targets_of(fields, model)
    variant = read_config(fields, new=True)
    beside = WholeFields.of(fields, type(variant).__name__).configs(variant)
    return [*beside, variant] if beside else variant


def read_config(config: Mapping[str, Any] | Any, *, new: bool) -> Variant:
    """Return the variant that a PEFT config describes.

    Args:
        config: as for `from_peft_config`.
        new: whether the adapter is to start as the config says. If not, its tensors come from a file.

    Raises:
        ConfigError: as for `from_peft_config`.
    """
    try:
        return _read(as_dict(config), new)
    except (AttributeError, RecursionError) as error:
        raise ConfigError(f"It is not a config of PEFT: {error}.") from error


def as_dict(config: Mapping[str, Any] | Any) -> dict[Any, Any]:
    """Return the fields of a `PeftConfig`, or of the content of an `adapter_config.json`.

    Raises:
        ConfigError: it is neither.
    """
    try:
        return dict(config if isinstance(config, Mapping) else config.to_dict())
    except AttributeError as error:
        raise ConfigError(f"It is not a config of PEFT: {error}.") from error


def _read(config: dict[Any, Any], new: bool) -> Variant:
    if method_of(config) in WHOLE_ONLY:
        whole_only = whole_config(config, new)
        _check_fields(config, own_fields(config), type(whole_only).__name__)
        return whole_only
    form = _format_for(config)
    name = form.variant.__name__
    fields: dict[str, Any] = dict(form.fixed)
    for ours, theirs in form.fields.items():
        value = config.get(theirs.name, theirs.default)
        try:
            fields[ours] = theirs.to_ours(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{name}: PEFT's {theirs.name}={value!r} is not a valid value.") from error
    known = {theirs.name for theirs in form.fields.values()} | form.unread | form.patterns
    known |= form.constants.keys() | form.written.keys() | {form.start}
    known |= frozenset() if new else form.unread_in_files
    whole = WholeFields.of(config, name)
    _check_fields(config, known | {"ensure_weight_tying"}, name)
    for key in form.patterns:
        pairs = config.get(key) or {}
        if not isinstance(pairs, Mapping):
            raise ConfigError(f"{name}: PEFT's {key} must map patterns to values, got {pairs!r}.")
        fields[key] = tuple((rf"^(.*\.)?({with_flags_inside(pattern)})$", value) for pattern, value in pairs.items())
    if new:
        fields |= _start(config, form)
    else:
        _warn_of_base(config.get(form.start), name)
        _warn_of_training(config, name)
    parameters = listed(config.get("target_parameters") or [], "target_parameters", name)
    by_parameter = (rf"{START}{re.escape(parameter.removesuffix('.weight'))}$" for parameter in parameters)
    fields["target_names"] = (*target_patterns(config, name, new), *by_parameter)
    fields["target_kinds"] = (*form.kinds, "experts") if parameters else form.kinds
    fields["exclude_names"] = (
        *name_patterns(config.get("exclude_modules") or (), "exclude_modules", name, START),
        *whole.excluded,
    )
    if form.variant is IA3:
        feedforward = config.get("feedforward_modules") or ()
        fields["feedforward_names"] = name_patterns(feedforward, "feedforward_modules", name, "")
    try:
        variant = form.variant(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error
    if config.get("ensure_weight_tying"):
        _check_ties(config, whole, new, name)
    return variant


def _check_fields(config: Mapping[Any, Any], known: Collection[str], name: str) -> None:
    """Raise `ConfigError` if a field that is not known says something."""
    for key in sorted(config.keys() - known - _UNREAD - _TARGETS - FIELDS, key=str):
        if config[key] not in (None, False, 0, "none", [], {}, ()):
            raise ConfigError(f"{name}: PEFT's {key}={config[key]!r} cannot be represented here.")


def _check_ties(config: Mapping[Any, Any], whole: WholeFields, new: bool, name: str) -> None:
    """Refuse one adapter for an embedding and the head that is tied to it; of a file, say that here they are two.

    Trained tokens are tied here without being asked.
    """
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        pattern = name_patterns(targets, "target_modules", name, START)
        targets = [embedding for embedding in TIED if occurs(pattern, embedding)]
    if not any(str(end).rpartition(".")[2] in TIED for end in (*targets, *whole.modules)):
        return
    if new:
        raise ConfigError(
            f"{name}: PEFT's ensure_weight_tying=True with {' or '.join(TIED)} cannot be represented here: adapters of"
            " an embedding and of the head that is tied to it are two. Leave it out to train them apart; for a few"
            " tokens, trainable_token_indices ties them."
        )
    warnings.warn(
        f"{name}: PEFT trained one adapter for the embedding and the head (ensure_weight_tying). Here they are two,"
        " with the same values as long as they are not trained on.",
        stacklevel=8,
    )


def _start(config: Mapping[str, Any], form: PeftFormat) -> dict[str, Any]:
    """Return the fields that let a new adapter start as PEFT's does.

    Raises:
        ConfigError: the variant has no such start, or PEFT ignores what the config says about it.
    """
    name = form.variant.__name__
    start = config.get(form.start, True)
    if form.start and not any(type(start) is type(known) and start == known for known in form.starts):
        known = " or ".join(map(repr, form.starts))
        raise ConfigError(
            f"{name}: PEFT's {form.start}={start!r} cannot be represented here: a new adapter starts as with {known}."
        )
    if form.same_rank and config.get("rank_pattern"):
        raise ConfigError(
            f"{name}: PEFT gives all its sites the rank r, whatever rank_pattern says. Leave it out, or write"
            f" {name}(rank_pattern=...) here."
        )
    fields = dict(form.starts[start]) if form.start else {}
    if form.variant is EVA:
        fields |= _eva(config.get("eva_config") or {})
    return fields


def _warn_of_base(start: object, name: str) -> None:
    """Warn of a file whose adapter was trained on a base that PEFT had changed, and of which the file does not tell."""
    if start in _STARTS_ON_ANOTHER_BASE:
        warnings.warn(
            f"{name}: with init_lora_weights={start!r} PEFT changes the base in memory before training. On the base as"
            " it was published the adapter computes something else than in training, here as in PEFT. Load it on the"
            " base that was saved with it, or save it in PEFT with path_initial_model_for_weight_conversion.",
            stacklevel=8,
        )
    elif isinstance(start, str) and start.startswith("pissa_niter"):
        warnings.warn(
            f"{name}: PEFT's init_lora_weights={start!r} factorizes the weight with random numbers, anew at each load."
            " Here the exact factors are subtracted from the base, so outputs agree up to that approximation.",
            stacklevel=8,
        )


_TRAINS_OTHERWISE = {
    "velora_config": "PEFT approximates the gradient of lora_A (VeLoRA), which is exact here",
    "use_effective_conv2d": "PEFT's gradients of hada_w1_a and hada_w2_a are not those of what it computes (LoHa at"
    " convolutions); here they are",
    "coft": "PEFT cuts the trained values themselves in each call, and here a call cuts what it reads",
    "init_lora_weights": "PEFT trains lora_A alone (MiCA). The way out: load it, and let nothing else require grad",
}


def _warn_of_training(config: Mapping[str, Any], name: str) -> None:
    """Warn of a file whose adapter computes the same here, and whose gradients in PEFT are others."""
    method = method_of(config)
    says = {
        "velora_config": bool(config.get("velora_config")),
        "use_effective_conv2d": method == "LOHA" and bool(config.get("use_effective_conv2d")),
        "coft": method == "OFT" and bool(config.get("coft")),
        "init_lora_weights": config.get("init_lora_weights") == "mica",
    }
    for field in (field for field, value in says.items() if value):
        warnings.warn(
            f"{name}: with {field}={config[field]!r} an adapter computes the same here as in PEFT, and trains"
            f" otherwise, because {_TRAINS_OTHERWISE[field]}.",
            stacklevel=8,
        )


def _eva(config: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Return the fields of `EVA` for PEFT's `eva_config`. Its `tau` bounds an error that there is not here."""
    options = dict(config if isinstance(config, Mapping) else vars(config))
    for key, only in (("whiten", False), ("adjust_scaling_factors", True)):
        if options.get(key, only) != only:
            raise ConfigError(f"EVA: PEFT's eva_config with {key}={options[key]!r} cannot be represented here.")
    masks = options.get("use_label_mask", True)
    if masks and options.get("label_mask_value", -100) != -100:
        raise ConfigError(
            f"EVA: PEFT's eva_config with label_mask_value={options['label_mask_value']!r} cannot be represented here;"
            " the value is -100."
        )
    return {"rho": options.get("rho", 2.0), "center": True, "use_label_mask": masks}


def _format_for(config: Mapping[str, Any]) -> PeftFormat:
    kind = method_of(config)
    plain = dict(config)
    for key in ("init_lora_weights", "init_weights"):
        start = config.get(key)
        if start in (True, False, None, *_PLAIN_STARTS) or start in _STARTS_ON_ANOTHER_BASE:
            plain[key] = True  # how it started does not matter any more
        elif isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start):
            plain[key] = "pissa"  # factorized by another algorithm
    mine = [form for form in FORMATS if form.peft_type == kind]
    for form in mine:
        if all(plain.get(key, value) == value for key, value in form.constants.items()):
            return form
    if not mine:
        known = ", ".join(dict.fromkeys((*(form.peft_type for form in FORMATS), *WHOLE_ONLY)))
        raise ConfigError(f"PEFT's method {kind!r} is not known here; known are {known}.")
    said = {key: plain[key] for form in mine for key in form.constants if key in plain}
    raise ConfigError(f"PEFT's {kind} with {said} cannot be represented here.")


def config_for(variant: Variant, modules: Sequence[PeftModule], names: Iterable[str]) -> dict[str, Any]:
    """Return the config, in PEFT's words, of `variant` in these modules of a model whose modules have these names.

    It lacks the fields that name the base, see `base_fields`.

    Raises:
        ConfigError: it cannot be represented.
    """
    form, name = format_of(variant), type(variant).__name__
    sites = [site for module in modules for site in module.sites]
    for module in modules:
        for site in module.sites:
            check_site(variant, site, as_module=not module.is_parameter)
    config: dict[str, Any] = {
        theirs.name: theirs.to_peft(getattr(variant, ours)) for ours, theirs in form.fields.items()
    }
    config |= {"peft_type": form.peft_type, "inference_mode": True}
    config |= {**form.constants, **form.written}
    targets = dict.fromkeys(module.name for module in modules if not module.is_parameter)
    config["target_modules"] = covering(list(targets), names) if targets else []
    if parameters := sorted(module.name for module in modules if module.is_parameter):
        config["target_parameters"] = parameters
    for key in sorted(form.patterns | {"rank_pattern", "alpha_pattern"}):
        field = {"rank_pattern": "r", "alpha_pattern": "alpha"}.get(key, key.removesuffix("_pattern"))
        # PEFT puts a dot before the patterns of its own fields, and takes names that are there in full.
        begins = "^" if key in ("rank_pattern", "alpha_pattern") else ""
        others = {
            f"{begins}{re.escape(m.name) if begins else m.name}": m.overrides[field]
            for m in modules
            if field in m.overrides
        }
        if not begins and any(m.name.endswith(f".{other}") for m in modules for other in others):
            raise ConfigError(f"{name}: PEFT would take a {field} for all modules whose names end alike.")
        if others and key not in form.patterns:
            raise ConfigError(f"{name}: PEFT has one {field} for all sites, and this adapter has several.")
        if key in form.patterns:
            config[key] = others
    if form.conv1d:
        whole = [site for module in modules for site in module.sites if not module.is_parameter]
        layouts = {site.transposed for site in whole if site.kind.vector_dims}
        config["fan_in_fan_out"] = layouts == {True}
    if isinstance(variant, IA3):
        feedforward = [re.escape(site.name) for site in sites if variant.gates_input(site)]
        config["feedforward_modules"] = "|".join(feedforward) or []
    return config
