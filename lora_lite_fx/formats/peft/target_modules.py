"""The modules that a config of PEFT names, as patterns of names; of `all-linear` and PEFT's defaults, in a model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...errors import ConfigError, is_instance_of

START = r"(^|\.)"
"""What may precede the end of a name."""
_FLAGS = re.compile(r"(\(\?[aiLmsux]+\))+")
_HEADS = ("score", "classifier")
"""What PEFT calls the heads of classifiers, which "all-linear" leaves out."""


def target_patterns(config: Mapping[str, Any], name: str, new: bool) -> tuple[str, ...]:
    """Return patterns for the modules and parameters that a config targets.

    Args:
        config: the config.
        name: our name of the method, for messages.
        new: whether it is for a new adapter. Of a file that does not name any, its tensors do.

    Raises:
        ConfigError: the targets have an impossible value, or depend on the model.
    """
    parameters = listed(config.get("target_parameters") or [], "target_parameters", name)
    by_parameter = (rf"{START}{re.escape(parameter.removesuffix('.weight'))}$" for parameter in parameters)
    return (*_module_patterns(config, name, new), *by_parameter)


def _module_patterns(config: Mapping[str, Any], name: str, new: bool) -> tuple[str, ...]:
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    parameters = config.get("target_parameters")
    if depends_on_model(targets):
        if new and not (targets is None and parameters):
            raise ConfigError(
                f"{name}: target_modules={targets!r} depends on the model: write from_peft_config(config, model), or"
                " give the names that PEFT makes of it."
            )
        return ()
    if not targets:
        if new and not parameters:
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


def excluded_patterns(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return patterns for the modules that a config excludes."""
    return name_patterns(config.get("exclude_modules") or (), "exclude_modules", name, START)


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


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for these names and no others."""
    return tuple(f"^{re.escape(name)}$" for name in names)


# Targets that depend on the model.


def depends_on_model(targets: object) -> bool:
    """Return whether `target_modules` has another meaning for each model."""
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def with_targets_of(config: Mapping[str, Any], tables: Mapping[str, str], model: nn.Module) -> dict[str, Any]:
    """Return a config whose `target_modules` are those of `model`, as PEFT chooses them.

    Args:
        config: the config.
        tables: see `PeftForm.default_tables`.
        model: the model to adapt.

    Raises:
        ConfigError: PEFT has no default targets for such a model, or is not installed, which has the tables of them.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str) and depends_on_model(targets):
        return {**config, "target_modules": _all_linear(model, config.get("task_type"))}
    if targets is not None or config.get("target_parameters"):
        return dict(config)
    unset = {field: table for field, table in tables.items() if config.get(field) is None}
    return {**config, **{field: _default_targets(table, model) for field, table in unset.items()}}


def _all_linear(model: nn.Module, task: Any) -> list[str]:
    """Return the names of all linears but the head."""
    names = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_instance_of(module, "transformers", "Conv1D")
    }
    left_out: object = None
    if is_instance_of(model, "transformers", "PreTrainedModel"):
        hugging_face: Any = model
        left_out = hugging_face.get_output_embeddings()
        if left_out is None and str(getattr(task, "value", task)) == "SEQ_CLS":
            left_out = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    return sorted(name for name, module in names.items() if module is not left_out)


def _default_targets(table: str, model: nn.Module) -> list[str]:
    """Return what one of PEFT's tables of default targets has for a model of this type."""
    kind, method = getattr(getattr(model, "config", None), "model_type", None), table.partition("_")[0]
    try:
        tables = importlib.import_module("peft.utils.constants")
    except ImportError as error:
        raise ConfigError(
            f"PEFT's default targets of {method} are in its own tables: install peft, or name them."
        ) from error
    targets = getattr(tables, f"TRANSFORMERS_MODELS_TO_{table}_MODULES_MAPPING", {}).get(kind)
    if targets is None:
        raise ConfigError(
            f"PEFT has no default targets of {method} for a model of the type {kind!r}: name the modules."
        )
    return sorted(targets)
