"""Find the form of a config of PEFT, and of a variant; read a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...adapters.variant import Variant
from ...errors import ConfigError
from .beside import BesideFields
from .form import PeftForm
from .methods import all_forms
from .target_modules import with_targets_of


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
    with _refusing_other_values():
        fields = dict(config if isinstance(config, Mapping) else config.to_dict())
    form = form_of_config(fields)
    if model is not None:
        fields = with_targets_of(fields, form.default_tables(), model)
    variant = read_config(form, fields, new=True)
    beside = BesideFields.of(fields, form.name).configs(variant)
    return [*beside, variant] if beside else variant


@contextmanager
def _refusing_other_values() -> Iterator[None]:
    try:
        yield
    except (AttributeError, RecursionError) as error:
        raise ConfigError(f"It is not a config of PEFT: {error}.") from error


@_refusing_other_values()
def form_of_config(config: Mapping[str, Any]) -> PeftForm:
    """Return the form of the adapter that a config describes.

    Raises:
        ConfigError: there is none.
    """
    kind = config.get("peft_type")
    method = str(getattr(kind, "value", kind))
    forms = [form for form in all_forms() if form.peft_type == method]
    for form in forms:
        if form.is_of(config):
            return form
    if not forms:
        known = ", ".join(dict.fromkeys(form.peft_type for form in all_forms()))
        raise ConfigError(f"PEFT's method {method!r} is not known here; known are {known}.")
    told = [(key, form.told(config)) for form in forms for key in form.constants]
    said = {key: values[key] for key, values in told if key in values}
    raise ConfigError(f"PEFT's {method} with {said} cannot be represented here.")


@_refusing_other_values()
def read_config(form: PeftForm, config: Mapping[str, Any], *, new: bool) -> Variant:
    """Return the variant that a config of a form describes.

    Args:
        form: the form.
        config: as for `from_peft_config`.
        new: whether the adapter is to start as the config says. If not, its tensors come from a file.

    Raises:
        ConfigError: as for `from_peft_config`.
    """
    return form.variant_of(config, new)


def form_of(variant: Variant) -> PeftForm:
    """Return the form in which PEFT has `variant`.

    Raises:
        ConfigError: PEFT does not have it.
    """
    for form in all_forms():
        if form.has(variant):
            return form
    raise ConfigError(f"PEFT has no method that computes {type(variant).__name__}.")
