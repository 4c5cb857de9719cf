"""PEFT's configs to ours, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...adapters.variant import Variant
from ...errors import ConfigError
from ...graph.provenance import inner_name
from ...sites.kinds.convolution import Convolution
from ...sites.site import Site
from ...variants import EVA, IA3
from .variants import FORMATS, PeftFormat
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
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"}
)
_START = r"(^|\.)"
_FLAGS = re.compile(r"(\(\?[aiLmsux]+\))+")


def from_peft_config(config: Mapping[str, Any] | Any) -> Variant | list[Variant]:
    """Return the variant that a PEFT config describes, with its targets as patterns of names.

    Args:
        config: a `PeftConfig`, or the content of an `adapter_config.json`.

    Returns:
        The config of the adapter. If PEFT trains whole modules or biases beside it (`modules_to_save`, `bias`, the head
        of a classifier), a list: those as `Full`, and the adapter last.

    Raises:
        ConfigError: it asks for something that cannot be represented here, or for a start that no new adapter has
            here; the message says what.
    """
    variant = read_config(config, new=True)
    beside = WholeFields.of(_plain(config), type(variant).__name__).configs(variant)
    return [*beside, variant] if beside else variant


def _plain(config: Mapping[str, Any] | Any) -> dict[Any, Any]:
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def read_config(config: Mapping[str, Any] | Any, *, new: bool) -> Variant:
    """Return the variant that a PEFT config describes.

    Args:
        config: as for `from_peft_config`.
        new: whether the adapter is to start as the config says. If not, its tensors come from a file.

    Raises:
        ConfigError: as for `from_peft_config`.
    """
    try:
        return _read(_plain(config), new)
    except (AttributeError, RecursionError) as error:
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
    whole = WholeFields.of(config, name)
    for key in sorted(config.keys() - known - _UNREAD - _TARGETS - FIELDS, key=str):
        if config[key] not in (None, False, 0, "none", [], {}, ()):
            raise ConfigError(f"{name}: PEFT's {key}={config[key]!r} cannot be represented here.")
    for key in form.patterns:
        pairs = config.get(key) or {}
        if not isinstance(pairs, Mapping):
            raise ConfigError(f"{name}: PEFT's {key} must map patterns to values, got {pairs!r}.")
        fields[key] = tuple((rf"^(.*\.)?({pattern})$", value) for pattern, value in pairs.items())
    if new:
        fields |= _start(config, form)
    fields["target_names"] = _targets(config, name)
    fields["target_kinds"] = form.kinds
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


def _targets(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not targets or targets == "all-linear":
        raise ConfigError(
            f"{name}: target_modules={targets!r} depends on PEFT's tables; give the names that PEFT made of it."
        )
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
        if config.get(key) in (True, False, None, "gaussian", "orthogonal"):
            plain[key] = True  # how it started does not matter any more
    mine = [form for form in FORMATS if form.peft_type == kind]
    for form in mine:
        if all(plain.get(key, value) == value for key, value in form.constants.items()):
            return form
    if not mine:
        known = ", ".join(dict.fromkeys(form.peft_type for form in FORMATS))
        raise ConfigError(f"PEFT's method {kind!r} is not known here; known are {known}.")
    said = {key: plain[key] for form in mine for key in form.constants if key in plain}
    raise ConfigError(f"PEFT's {kind} with {said} cannot be represented here.")


def format_of(variant: Variant) -> PeftFormat:
    """Return how PEFT writes `variant`.

    Raises:
        ConfigError: PEFT does not have it.
    """
    for form in FORMATS:
        fixed = all(getattr(variant, name, None) == value for name, value in form.fixed.items())
        if form.variant is type(variant) and fixed:
            return form
    raise ConfigError(f"PEFT has no method that computes {type(variant).__name__}.")


def config_for(variant: Variant, sites: list[Site], modules: Iterable[str]) -> dict[str, Any]:
    """Return the config, in PEFT's words, of `variant` at `sites` of a model whose modules have the names `modules`.

    It lacks the fields that name the base, see `base_fields`.

    Raises:
        ConfigError: it cannot be represented.
    """
    form, name = format_of(variant), type(variant).__name__
    for site in sites:
        if not site.weight.startswith(f"{site.name}."):
            raise ConfigError(f"{name}: PEFT adapts modules, and site {site.name!r} is not a module of its own.")
        if any(inner_name(call.node) not in (None, site.name) for call in site.calls):
            raise ConfigError(
                f"{name}: PEFT adapts the calls of modules, and the model reads the weight of {site.name!r} without"
                " calling that module."
            )
        if site.kind.name not in form.kinds:
            raise ConfigError(
                f"{name}: files of PEFT hold it for linears only here; {site.name!r} is {site.kind.article}."
            )
        if isinstance(site.kind, Convolution) and set(site.kind.dilation) != {1}:
            raise ConfigError(f"{name}: PEFT's convolutions are not dilated, and {site.name!r} is.")
        if site.kind.name == "embedding" and getattr(variant, "bias", False):
            raise ConfigError(f"{name}: PEFT has no bias at an embedding, and {site.name!r} is one.")
        if site.transposed and not form.conv1d:
            raise ConfigError(f"{name}: PEFT has it for ordinary linears only, and {site.name!r} is a Conv1D.")
    config: dict[str, Any] = {
        theirs.name: theirs.to_peft(getattr(variant, ours)) for ours, theirs in form.fields.items()
    }
    config |= {"peft_type": form.peft_type, "inference_mode": True}
    config |= {**form.constants, **form.written}
    names = [site.name for site in sites]
    config["target_modules"] = _covering(names, modules)
    for field, key in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        overrides = {site: variant.overrides(site) for site in names}
        others = {f"^{re.escape(site)}": values[field] for site, values in overrides.items() if field in values}
        if others and key not in form.patterns:
            raise ConfigError(f"{name}: PEFT has one {field} for all sites, and this adapter has several.")
        if key in form.patterns:
            config[key] = others
    if form.conv1d:
        layouts = {site.transposed for site in sites if site.kind.name == "linear"}
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
