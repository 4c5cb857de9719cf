"""The registry of variants, and variants as JSON-ready data.

A graph belongs to the variant that it was made with. So its record names the class and has a fingerprint of the code of
`forward`, and in this process it leads to that very class, registered or not, also after a class of the same name has
been defined anew. A file leads to the registered class, whose code must be that of the fingerprint.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..errors import ConfigError, shown
from .declaration import annotated_fields, is_declared
from .fingerprint import code_fingerprint, is_same_code
from .variant import Variant

_REGISTRY: dict[str, type[Variant]] = {}
_MADE_WITH: dict[tuple[str, ...], type[Variant]] = {}
"""The classes outside this package of which this process has made configs, by name and fingerprint."""
V = TypeVar("V", bound=type[Variant])


def register(cls: V) -> V:
    """Class decorator: make a variant known by its class name, so that its checkpoints can be loaded.

    A class that is defined again, as by a notebook's cell that runs a second time, takes the place of the former one.
    It is a warning if its `forward` has other code, because graphs that exist keep the code they were made with.

    Raises:
        ConfigError: another class has the name, or `cls` is not a frozen dataclass derived from `Variant`.
    """
    _check_class(cls)
    name = cls.__name__
    known = _REGISTRY.get(name)
    if known is not None and not _is_redefinition(cls, known):
        raise ConfigError(
            f"A variant named {name} is already registered, by {known.__module__}. Files and graphs name variants by"
            " their class, so give this one another name."
        )
    code = code_fingerprint(cls)  # of the source as it is now
    if known is not None and not _is_made_with(known, code):
        warnings.warn(
            f"{name} is defined anew, with other code in forward. Graphs that were made with the former {name} keep its"
            f" code. Files of the former {name} are refused from now on.",
            stacklevel=2,
        )
    _REGISTRY[name] = cls
    return cls


def _check_class(cls: object) -> None:
    """Raise `ConfigError` unless `cls` is a variant's class and a frozen dataclass of its own."""
    if not (isinstance(cls, type) and issubclass(cls, Variant)):
        named = cls.__name__ if isinstance(cls, type) else shown(cls)
        raise ConfigError(f"{named} must be a frozen dataclass derived from Variant.")
    if not is_declared(cls):
        fields = annotated_fields(cls)
        why = f", so its field{'s' * (len(fields) > 1)} {', '.join(fields)} would have no effect" if fields else ""
        raise ConfigError(
            f"{cls.__name__} is not a dataclass of its own{why}. Write both decorators above the class, in this order:"
            f" @register, @dataclass(frozen=True, kw_only=True), class {cls.__name__}({cls.__mro__[1].__name__})."
        )


def _is_redefinition(cls: type, known: type) -> bool:
    return (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)


def registry() -> dict[str, type[Variant]]:
    """Return the registered variants by name, in the order of registration."""
    return dict(_REGISTRY)


_NOT_ON_EVERY_VARIANT = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
"""Fields that every variant had at first. Older files name them for variants that have no use for them, too."""


def to_config(variant: Variant) -> dict[str, Any]:
    """Return the variant as JSON-ready data: its class name under `"variant"`, then its fields.

    Of a class outside this package it also says where it was defined, under `"class"`, and the fingerprint of its code,
    under `"forward"`. Neither can be the name of a field.
    """
    cls = type(variant)
    config: dict[str, Any] = {"variant": cls.__name__}
    code = code_fingerprint(cls)
    if code is not None:
        config |= {"class": f"{cls.__module__}.{cls.__qualname__}", "forward": code}
        _MADE_WITH[_key(cls.__name__, code)] = cls
    config |= {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    config["dtype"] = None if variant.dtype is None else str(variant.dtype).removeprefix("torch.")
    if variant.slots is None:
        del config["slots"]  # which earlier versions do not know
    return config


def from_config(config: Mapping[str, Any]) -> Variant:
    """Return the variant that `to_config` described, in this version or an earlier one, of the registered class.

    Args:
        config: what `to_config` returned. A rank or an alpha, or patterns of them, are left out if the variant has
            none: earlier versions gave these fields to every variant, and they had no effect. A fingerprint may be
            missing, as in files of earlier versions.

    Raises:
        ConfigError: the variant is unknown or its code has changed, one of its fields is unknown, or a value is
            invalid.
    """
    return _made(_registered(config), config)


def recorded_variant(config: Mapping[str, Any]) -> Variant:
    """Return the variant that a graph records, of the class that it was made with if that was in this process.

    Args:
        config: as for `from_config`.

    Raises:
        ConfigError: the class was made in another process, and `from_config` refuses it; or its code has been changed.
    """
    name, code = config.get("variant"), config.get("forward")
    cls = _MADE_WITH.get(_key(str(name), code)) if isinstance(code, Mapping) else None
    if cls is None or not _is_made_with(cls, code):
        cls = _registered(config)
    return _made(cls, config)


def check_saving(variant: Variant) -> None:
    """Check that a file with this variant can be loaded again. A class that was defined anew since is a warning.

    Raises:
        ConfigError: the class is not registered, or the config has a value that no file can hold.
    """
    cls = type(variant)
    name, known = cls.__name__, _REGISTRY.get(cls.__name__)
    if known is None or not (known is cls or _is_redefinition(cls, known)):
        other = "" if known is None else f" That {known.__module__} registers another {name} is no use here."
        raise ConfigError(
            f"{name} is not registered, so no process could load the file.{other} Write @register above the class, or"
            f" call llfx.register({name}), and save again."
        )
    config = to_config(variant)
    if _is_made_with(known, config.get("forward")):
        from_config(config)
    else:
        warnings.warn(
            f"{name} has been defined anew since these adapters were made. The file can be loaded only where the code"
            f" of {name}.forward is what it was then.",
            stacklevel=3,
        )


def _is_made_with(cls: type, code: Mapping[str, str] | None) -> bool:
    """Return whether the code of `cls` is that of a fingerprint, as far as can be told. This package's has None."""
    now = code_fingerprint(cls)
    return now is code if now is None or code is None else is_same_code(now, code) is not False


def _key(name: str, code: Mapping[str, str]) -> tuple[str, ...]:
    return (name, *(f"{kind} {value}" for kind, value in sorted(code.items())))


def _registered(config: Mapping[str, Any]) -> type[Variant]:
    """Return the registered class of a config, whose code is that of the config.

    Raises:
        ConfigError: there is none; the message says how there will be one.
    """
    name, code, defined = config.get("variant"), config.get("forward"), config.get("class")
    cls = _REGISTRY.get(name)  # type: ignore[arg-type]  # a name of another type is not there
    if cls is None:
        near = difflib.get_close_matches(str(name), _REGISTRY, n=1)
        raise ConfigError(
            f"Unknown variant {shown(name)}{f', did you mean {near[0]!r}?' if near else '.'} If the class is your"
            f" own{_at(defined)}, write @register above it, and import the module that defines it before this call; on"
            f" the command line, --import MODULE. The registered variants are {', '.join(sorted(_REGISTRY))}."
        )
    if code is None:
        return cls
    if not (isinstance(code, Mapping) and all(isinstance(value, str) for value in code.values())):
        raise ConfigError(f"{name}: its fingerprint is damaged: {shown(code)}.")
    if not _is_made_with(cls, code):
        raise ConfigError(
            f"The source of {name}.forward, or of what it reads, is not what it was when the adapter was"
            f" made{_at(defined)}, so it may compute something else. Define {name} as it was. Or, if both compute the"
            " same, copy the tensors into a new adapter:"
            f" llfx.load_adapter_state_dict(llfx.rewrite(model, {name}(...)), tensors). The tensors are"
            " llfx.adapter_state_dict(graph) or safetensors.torch.load_file(file)."
        )
    if is_same_code(code, code_fingerprint(cls) or {}) is None:
        warnings.warn(
            f"Whether the code of {name}.forward is what it was when the adapter was made{_at(defined)} cannot be told."
            " Its source was not at hand then or is not now, or an earlier version of this library wrote the file. Save"
            " the adapter again, from a class that is defined in a file or a notebook, to have it checked from now on.",
            stacklevel=2,
        )
    return cls


def _at(defined: object) -> str:
    """Return where a class was defined, as a config says it, for a message."""
    return f" (as {shown(defined)[1:-1]})" if isinstance(defined, str) else ""


def _made(cls: type[Variant], config: Mapping[str, Any]) -> Variant:
    """Return a variant of the class `cls`, with the fields of a config."""
    name = cls.__name__
    fields = {key: value for key, value in config.items() if key not in ("variant", "class", "forward")}
    for field in _NOT_ON_EVERY_VARIANT - {f.name for f in dataclasses.fields(cls)}:
        fields.pop(field, None)
    if fields.get("dtype") is not None:
        dtype = getattr(torch, str(fields["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{name}: dtype {fields['dtype']!r} is not the name of a torch.dtype.")
        fields["dtype"] = dtype
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error
