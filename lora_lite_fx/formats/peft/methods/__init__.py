"""The methods of PEFT that are here, one file each. Each file lists the forms of its method in `FORMS`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..form import PeftForm

FORMS: tuple[PeftForm, ...] = tuple(
    form for file in iter_modules(__path__) for form in import_module(f"{__name__}.{file.name}").FORMS
)
"""All forms, by the names of their files."""
