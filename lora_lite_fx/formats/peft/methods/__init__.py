"""The methods of PEFT that are here, one file each. Each file lists the forms of its method in `FORMS`."""

from __future__ import annotations

import functools
from importlib import import_module
from pkgutil import iter_modules

from ..form import PeftForm


@functools.cache
def all_forms() -> tuple[PeftForm, ...]:
    """Return all forms in the order of the names of their files, which are imported when they are first asked for."""
    files = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    return tuple(form for file in files for form in file.FORMS)
