"""Print what each field of PEFT's configs is here, with both defaults: `python -m tests.formats.peft.field_table`.

docs/from_peft.md holds the table; a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_lite_fx.formats.peft.form import PeftForm
from lora_lite_fx.formats.peft.methods import all_forms

HEAD = "| variant | PEFT's method | PEFT's field and default | here |\n|---|---|---|---|"


def field_table() -> str:
    """Return the table, in which defaults that differ are bold."""
    return "\n".join([HEAD, *_lines()])


def _lines() -> Iterator[str]:
    told: set[str] = set()
    for form in all_forms():
        name = form.variant.__name__
        if name in told or not form.fields:
            continue
        told.add(name)
        theirs = _defaults(form)
        ours = form.variant()
        pairs = [
            (f"`{field.name}={_short(theirs[field.name])}`", _here(form, field.to_ours, theirs[field.name], own, ours))
            for own, field in form.fields.items()
        ]
        chosen = [f"`{key}={value!r}`" for key, value in form.constants.items() if value != theirs.get(key)]
        there, here = ("<br>".join(side) for side in zip(*pairs, strict=True))
        yield f"| `{name}` | {', '.join([form.peft_type, *chosen])} | {there} | {here} |"


def _defaults(form: PeftForm) -> dict[str, Any]:
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[form.peft_type]  # type: ignore[index]
    defaults: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            defaults[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            defaults[item.name] = item.default_factory()
    return defaults


def _here(form: PeftForm, to_ours: Any, theirs: Any, name: str, ours: Any) -> str:
    value = getattr(ours, name)
    text = f"`{name}={_short(value)}`"
    return text if to_ours(theirs) == value else f"**{text}**"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


if __name__ == "__main__":
    print(field_table())
