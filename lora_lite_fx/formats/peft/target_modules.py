"""The modules that a config of PEFT names, as patterns of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import ConfigError
from .default_targets import depends_on_model

START = r"(^|\.)"
"""What may precede the end of a name."""
_FLAGS = re.compile(r"(\(\?[aiLmsux]+\))+")


def target_patterns(config: Mapping[str, Any], name: str, new: bool) -> tuple[str, ...]:
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
        return name_patterns(targets, "target_modules", name, START)
    layers = [layers] if isinstance(layers, int) else layers
    stacks = config.get("layers_pattern") or None
    stacks = [stacks] if isinstance(stacks, str) else stacks
    if isinstance(targets, str) or not (stacks is None or _are(stacks, str)):
        raise ConfigError(f"{name}: layers_to_transform needs target_modules and layers_pattern to be lists of names.")
    if not _are(layers, int):
        raise ConfigError(f"{name}: layers_to_transform must be a list of integers, got {layers!r}.")
    inside = rf"(?=(?>{_before_the_layer(stacks)})0*(?:{'|'.join(map(str, layers))})\.).*\."
    # A module that a list names in full is meant whatever its layer is.
    return tuple(f"^(?:{inside})?{re.escape(target)}$" for target in listed(targets, "target_modules", name))


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


def name_patterns(value: Any, what: str, name: str, start: str) -> tuple[str, ...]:
    """Return regular expressions for the modules that PEFT names by `value`.

    A string is one expression for the whole name. A list holds endings, and `start` is what may precede them.
    """
    if isinstance(value, str):
        return (rf"^(?:{with_flags_inside(value)})$",)
    return tuple(f"{start}{re.escape(item)}$" for item in listed(value, what, name))


def listed(value: Any, what: str, name: str) -> list[str]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name}: PEFT's {what} must be a string or a list of strings, got {value!r}.")
    return sorted(value)


def with_flags_inside(pattern: str) -> str:
    """Return an expression that may stand inside another: flags such as `(?i)` at its start hold for it alone."""
    if (flags := _FLAGS.match(pattern)) is None:
        return pattern
    letters = "".join(dict.fromkeys(letter for letter in flags.group() if letter.isalpha()))
    rest = pattern[flags.end() :]
    return f"(?{letters}:{rest}\n)" if "x" in letters else f"(?{letters}:{rest})"  # a comment ends with the line


def covering(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """Return PEFT's shortest name for these modules and no others: their last names, or one regular expression."""
    tails = sorted({name.rpartition(".")[2] for name in names})
    if {module for module in modules if module.rpartition(".")[2] in tails} == set(names):
        return tails
    return "|".join(re.escape(name) for name in names)
