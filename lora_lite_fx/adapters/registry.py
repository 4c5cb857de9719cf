"""The registry of variants, and variants as JSON-ready data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..errors import ConfigError
from .variant import Variant

_REGISTRY: dict[str, type[Variant]] = {}
V = TypeVar("V", bound=type[Variant])


def register(cls: V) -> V:
    """Class decorator: make a variant known by its class name, so that its checkpoints can be loaded.

    Raises:
        ConfigError: another class has the name, or `cls` is not a frozen dataclass derived from `Variant`.
    """
    if not (issubclass(cls, Variant) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{cls.__name__} must be a frozen dataclass derived from Variant.")
    known = _REGISTRY.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"A variant named {cls.__name__} is already registered, by {known.__module__}.")
    _REGISTRY[cls.__name__] = cls
    return cls


def registry() -> dict[str, type[Variant]]:
    """Return the registered variants by name, in the order of registration."""
    return dict(_REGISTRY)


def to_config(variant: Variant) -> dict[str, Any]:
    """Return the variant as JSON-ready data: its class name under `"variant"`, then its fields."""
    fields = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    fields["dtype"] = None if variant.dtype is None else str(variant.dtype).removeprefix("torch.")
    return {"variant": type(variant).__name__, **fields}


_NOT_ON_EVERY_VARIANT = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
"""Fields that every variant had at first. Older files name them for variants that have no use for them, too."""


def from_config(config: Mapping[str, Any]) -> Variant:
    """Return the variant that `to_config` described, in this version or an earlier one.

    Args:
        config: what `to_config` returned. A rank or an alpha, or patterns of them, are left out if the variant has
            none: earlier versions gave these fields to every variant, and they had no effect.

    Raises:
        ConfigError: the variant or one of its fields is unknown, or a value is invalid.
    """
    fields = dict(config)
    name = fields.pop("variant", None)
    if name not in _REGISTRY:
        raise ConfigError(f"Unknown variant {name!r}; the registered variants are {', '.join(sorted(_REGISTRY))}.")
    cls = _REGISTRY[name]
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
