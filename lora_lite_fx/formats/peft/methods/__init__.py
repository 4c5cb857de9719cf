"""The methods of PEFT that are here, one file each. Each file lists the forms of its method in `FORMS`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ....adapters.variant import Variant
from ....errors import ConfigError
from ..form import PeftForm


@functools.cache
def all_forms() -> tuple[PeftForm, ...]:
    """Return all forms in the order of the names of their files, which are imported when they are first asked for."""
    files = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    return tuple(form for file in files for form in file.FORMS)


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


def form_of(variant: Variant) -> PeftForm:
    """Return the form in which PEFT has `variant`.

    Raises:
        ConfigError: PEFT does not have it.
    """
    for form in all_forms():
        if form.has(variant):
            return form
    raise ConfigError(f"PEFT has no method that computes {type(variant).__name__}.")
