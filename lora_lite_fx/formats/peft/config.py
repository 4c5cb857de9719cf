"""PEFT's configs to ours, and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...adapters.variant import Variant
from ...errors import ConfigError
from ...variants import EVA, IA3
from .default_targets import depends_on_model, with_targets_of
from .modules import PeftModule
from .sites import check_site
from .variants import FORMATS, PeftFormat, format_of
from .whole import FIELDS, WholeFields

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
_START = r"(^|\.)"
_FLAGS = re.compile(r"(\(\?[aiLmsux]+\))+")


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
    for key in sorted(config.keys() - known - _UNREAD - _TARGETS - FIELDS, key=str):
        if config[key] not in (None, False, 0, "none", [], {}, ()):
            raise ConfigError(f"{name}: PEFT's {key}={config[key]!r} cannot be represented here.")
    for key in form.patterns:
        pairs = config.get(key) or {}
        if not isinstance(pairs, Mapping):
            raise ConfigError(f"{name}: PEFT's {key} must map patterns to values, got {pairs!r}.")
        fields[key] = tuple((rf"^(.*\.)?({_with_flags_inside(pattern)})$", value) for pattern, value in pairs.items())
    if new:
        fields |= _start(config, form)
    else:
        _warn_of_base(config.get(form.start), name)
    parameters = _listed(config.get("target_parameters") or [], "target_parameters", name)
    by_parameter = (rf"{_START}{re.escape(parameter.removesuffix('.weight'))}$" for parameter in parameters)
    fields["target_names"] = (*_targets(config, name, new), *by_parameter)
    fields["target_kinds"] = (*form.kinds, "experts") if parameters else form.kinds
    fields["exclude_names"] = (
        *_patterns(config.get("exclude_modules") or (), "exclude_modules", name, _START),
        *whole.excluded,
    )
    if form.variant is IA3:
        feedforward = config.get("feedforward_modules") or ()
        fields["feedforward_names"] = _patterns(feedforward, "feedforward_modules", name, "")
    try:
        return form.variant(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error


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
            stacklevel=7,
        )
    elif isinstance(start, str) and start.startswith("pissa_niter"):
        warnings.warn(
            f"{name}: PEFT's init_lora_weights={start!r} factorizes the weight with random numbers, anew at each load."
            " Here the exact factors are subtracted from the base, so outputs agree up to that approximation.",
            stacklevel=7,
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


def _targets(config: Mapping[str, Any], name: str, new: bool) -> tuple[str, ...]:
    """Return patterns for the modules that a config targets. Of a file that does not name any, its tensors do."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if depends_on_model(targets):
        if new and not (targets is None and config.get("target_parameters")):
            raise ConfigError(
                f"{name}: target_modules={targets!r} depends on the model: write from_peft_config(config, model), or"
                " give the names that PEFT makes of it."
            )
        return ()
    if not targets:
        if new and not config.get("target_parameters"):
            raise ConfigError(f"{name}: target_modules={targets!r} names no module.")
        return ()
    if layers in (None, []):
        return _patterns(targets, "target_modules", name, _START)
    layers = [layers] if isinstance(layers, int) else layers
    stacks = config.get("layers_pattern") or None
    stacks = [stacks] if isinstance(stacks, str) else stacks
    if isinstance(targets, str) or not (stacks is None or _are(stacks, str)):
        raise ConfigError(f"{name}: layers_to_transform needs target_modules and layers_pattern to be lists of names.")
    if not _are(layers, int):
        raise ConfigError(f"{name}: layers_to_transform must be a list of integers, got {layers!r}.")
    inside = rf"(?=(?>{_before_the_layer(stacks)})0*(?:{'|'.join(map(str, layers))})\.).*\."
    # A module that a list names in full is meant whatever its layer is.
    return tuple(f"^(?:{inside})?{re.escape(target)}$" for target in _listed(targets, "target_modules", name))


def _before_the_layer(stacks: Iterable[str] | None) -> str:
    """Return an expression for the part of a name before the number that PEFT takes for the layer's.

    That is the first number after a part that is called like one of `stacks`, of which an earlier one goes before a
    later one; without `stacks`, the first number that is neither the first nor the second part of the name.
    """
    if not stacks:
        return r".*?\.[^.]*\.(?=\d+\.)"
    return "|".join(rf"(?:(?:^|.*?\.){stack}\.(?=\d+\.))" for stack in stacks)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, Iterable) and all(type(value) is kind for value in values)


def _patterns(value: Any, what: str, name: str, start: str) -> tuple[str, ...]:
    """Return regular expressions for the modules that PEFT names by `value`.

    A string is one expression for the whole name. A list holds endings, and `start` is what may precede them.
    """
    if isinstance(value, str):
        return (rf"^(?:{_with_flags_inside(value)})$",)
    return tuple(f"{start}{re.escape(item)}$" for item in _listed(value, what, name))


def _listed(value: Any, what: str, name: str) -> list[str]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name}: PEFT's {what} must be a string or a list of strings, got {value!r}.")
    return sorted(value)


def _with_flags_inside(pattern: str) -> str:
    """Return an expression that may stand inside another: flags such as `(?i)` at its start hold for it alone."""
    if (flags := _FLAGS.match(pattern)) is None:
        return pattern
    letters = "".join(dict.fromkeys(letter for letter in flags.group() if letter.isalpha()))
    rest = pattern[flags.end() :]
    return f"(?{letters}:{rest}\n)" if "x" in letters else f"(?{letters}:{rest})"  # a comment ends with the line


def _format_for(config: Mapping[str, Any]) -> PeftFormat:
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
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
        known = ", ".join(dict.fromkeys(form.peft_type for form in FORMATS))
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
    config["target_modules"] = _covering(list(targets), names) if targets else []
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
        layouts = {site.transposed for site in whole if site.kind.name == "linear"}
        config["fan_in_fan_out"] = layouts == {True}
    if isinstance(variant, IA3):
        feedforward = [re.escape(site.name) for site in sites if variant.gates_input(site)]
        config["feedforward_modules"] = "|".join(feedforward) or []
    return config


def _covering(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """Return PEFT's shortest name for these modules and no others: their last names, or one regular expression."""
    tails = sorted({name.rpartition(".")[2] for name in names})
    if {module for module in modules if module.rpartition(".")[2] in tails} == set(names):
        return tails
    return "|".join(re.escape(name) for name in names)
