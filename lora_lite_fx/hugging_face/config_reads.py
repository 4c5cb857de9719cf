"""Find out what of its configs a model reads while it is captured: a graph has these values for good."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_CALLS_FOLLOW = frozenset(
    ("use_cache", "use_mems_eval", "use_mems_train", "return_dict", "output_attentions", "output_hidden_states")
)
"""What is part of the structure of a call, or of its arguments, and so not of a graph."""

Reads = set[tuple[type, str]]
"""Classes of configs, and attributes of theirs."""


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Yield a set that gets what is read of configs of transformers inside.

    Captures copy the configs of a model, so that what they read is known by class. One thread alone captures.
    """
    reads: Reads = set()
    transformers = sys.modules.get("transformers")
    if transformers is None:  # a model of diffusers, whose config cannot be changed
        yield reads
        return
    base: Any = transformers.PreTrainedConfig
    original = base.__getattribute__

    def read(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            reads.add((type(self), name))
        return original(self, name)

    base.__getattribute__ = read
    try:
        yield reads
    finally:
        base.__getattribute__ = original


@dataclass
class ConfigValues:
    """The values of configs that a graph was captured with.

    Args:
        values: the attributes of a config, the name of one of them, and its value.
    """

    values: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, reads: Reads) -> ConfigValues:
        """Return the numbers among what was read, as the configs of `model` have them now."""
        values: list[tuple[Mapping[str, Any], str, Any]] = []
        for config in _configs_of(model):
            names = getattr(config, "attribute_map", {})
            for kind, read in sorted(reads, key=lambda each: each[1]):
                name = names.get(read, read)
                if kind is type(config) and name not in _CALLS_FOLLOW and _is_number(vars(config).get(name, ())):
                    values.append((vars(config), name, vars(config)[name]))
        return cls(values)

    def change(self) -> str:
        """Return in words which of the values is another one now; empty if none is."""
        for attributes, name, value in self.values:
            if (now := attributes.get(name)) is not value and now != value:
                return f"config.{name} is {now!r}, and was {value!r}"
        return ""


def _configs_of(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        for each in (config, *getattr(config, "__dict__", {}).values()):
            if hasattr(each, "get_text_config"):
                found[id(each)] = each
    return list(found.values())


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
