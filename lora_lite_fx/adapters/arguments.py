"""Check the arguments of a variant's constructor, and say what to write instead of those that it does not have.

Many users come from PEFT and use its words. The hints translate them: by a table, by leaving out the method's name that
PEFT puts in front (`lora_alpha`, `oft_block_size`), and else by the nearest name.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError

_RENAMED = {
    "rank": "r",
    "use_rslora": "rank_stabilized",
    "layers_to_transform": "layers",
    "exclude_modules": "exclude_names",
    "apply_GS": "orthogonal",
    "delora_lambda": "lambda0",
    "variant": "kind",
    "boft_n_butterfly_factor": "butterfly_factors",
    "projection_prng_key": "projection_seed",
    "random_loc_seed": "seed",
}
"""PEFT's names of fields, and other common ones, to ours."""

_ABSENT = {
    "r": "rank",
    "rank_pattern": "rank",
    "alpha": "alpha",
    "alpha_pattern": "alpha",
    "rank_stabilized": "alpha",
    "dropout": "dropout",
}
"""Fields of some variants, and the thing that a variant without the field lacks."""

_NOT_NEEDED = {
    "fan_in_fan_out": "the layout of each weight is read from the model",
    "task_type": "the class of the model says it",
    "inference_mode": "model.eval() and model.train() switch the mode",
    "peft_type": "the class of the config says it",
    "layers_pattern": "layers are counted by the first number in the qualified name",
    "base_model_name_or_path": "the model is given to rewrite, adapt or load",
}
"""Fields of PEFT that have no counterpart because something else does their work."""

ALL_LINEAR = "all-linear"
"""What PEFT calls the linears of a model in a field of targets."""

ALL_LINEAR_HERE = (
    "the default roles are every linear of attention and of the feed-forward layers, so leave it out, or write"
    ' target_roles=("attention", "mlp")'
)
"""What to write instead."""

_STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "eva": "EVA"}
"""The variants that PEFT calls a way to start a LoRA."""


def check_arguments(cls: type, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raise `ConfigError` if the constructor of `cls` does not have one of these arguments.

    Args:
        cls: any dataclass. Its signature is read, so that a user's own variant gets the same hints.
        args: the positional arguments.
        kwargs: the arguments by name.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    kinds = {parameter.kind for parameter in parameters}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fields = [parameter.name for parameter in parameters]
    if len(args) > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ConfigError(f"{cls.__name__} takes its fields by name: {_by_name(cls, args, fields)}.")
    unknown = [] if inspect.Parameter.VAR_KEYWORD in kinds else [name for name in kwargs if name not in fields]
    if unknown:
        raise ConfigError("\n".join(f"{_hint(cls.__name__, name, kwargs[name], fields)}." for name in unknown))


def _by_name(cls: type, args: Sequence[object], fields: Sequence[str]) -> str:
    """Say how to write these positional arguments."""
    numbers = [name for name in ("r", "alpha") if name in fields]
    if len(args) <= len(numbers) and all(type(value) in (int, float) for value in args):
        named = zip(numbers, args, strict=False)
        return f"write {cls.__name__}({', '.join(f'{name}={value!r}' for name, value in named)})"
    if len(args) == 1 and isinstance(args[0], str):
        return f"write {cls.__name__}(target_names={args[0]!r}) to adapt the sites whose name matches"
    kinds = ", ".join(type(value).__name__ for value in args)
    return f"it has {', '.join(fields)}, and got {len(args)} without a name ({kinds})"


def _hint(cls: str, name: str, value: Any, fields: Sequence[str]) -> str:
    """Say what to write instead of the argument called `name`."""
    ours = _our_name(name, fields)
    if ours in fields:
        return f"{cls} has no field {name!r}: write {ours}={value!r}"
    if ours in _ABSENT:
        return f"{cls} has no {_ABSENT[ours]}: remove {name}={value!r}"
    if name in ("target_modules", "feedforward_modules"):
        return f"{cls} has no field {name!r}: {_target_hint(name.replace('modules', 'names'), value, fields)}"
    if name == "modules_to_save":
        return (
            f"{cls} has no field {name!r}: a config of its own trains whole modules. Write"
            f" [Full(target_names=({_patterns(value)})), {cls}(...)]"
        )
    if name == "use_dora":
        return (
            f"{cls} has no field {name!r}: {'write DoRA(...) in place of ' + cls + '(...)' if value else 'remove it'}"
        )
    if name.startswith("init_") and name.endswith("_weights"):
        return f"{cls} has no field {name!r}: {_start_hint(cls, value, fields)}"
    if name == "bias":
        return (
            f"{cls} has no field {name!r}: Full(weight=False, ...) trains biases of the model. Remove {name}={value!r}"
        )
    if name in _NOT_NEEDED:
        return f"{cls} has no field {name!r}: it is not needed, because {_NOT_NEEDED[name]}. Remove it"
    near = difflib.get_close_matches(name, fields, n=1)
    return (
        f"{cls} has no field {name!r}" + (f", did you mean {near[0]!r}?" if near else ".")
        + f" Its fields are {', '.join(fields)}"
    )  # fmt: skip


def _our_name(name: str, fields: Sequence[str]) -> str:
    """Return our name of a field, by the table or without the method's name in front."""
    if name in _RENAMED:
        return _RENAMED[name]
    tail = name.partition("_")[2]
    if tail == "rank":
        return "r"
    return tail if tail in fields or tail in _ABSENT else name


def _target_hint(field: str, value: Any, fields: Sequence[str]) -> str:
    """Say how to name the targets that PEFT's config names by `value`."""
    if field not in fields:
        return "remove it"
    if value == ALL_LINEAR:
        return ALL_LINEAR_HERE
    return f"write {field}=({_patterns(value)}), regular expressions that are searched in the qualified name"


def _patterns(value: Any) -> str:
    """Return the code of a tuple of patterns for the modules that PEFT names by `value`."""
    if isinstance(value, str):
        patterns = [f"^({value})$"]
    elif isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value):
        patterns = [
            rf"(^|\.){re.escape(item)}$" for item in (value if isinstance(value, (list, tuple)) else sorted(value))
        ]
    else:
        patterns = [r"(^|\.)q_proj$"]
    return ", ".join(f'r"{pattern}"' for pattern in patterns) + ("," if len(patterns) == 1 else "")


def _start_hint(cls: str, value: object, fields: Sequence[str]) -> str:
    """Say which variant starts as PEFT's way to initialize called `value` does."""
    start = str(value).partition("_")[0].lower()
    if start == "gaussian" and "init_weights" in fields:
        return 'write init_weights="gaussian"'
    if start in _STARTS:
        return f"write {_STARTS[start]}(...) in place of {cls}(...)"
    return (
        "a variant has one way to start. Remove it, or use PiSSA(...) or OLoRA(...) to start from the weight, or"
        " EVA(...) to start from data"
    )
