"""Find out what of its configs a model reads while it is captured: a graph has these values for good."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_CALLS_FOLLOW = frozenset(("use_cache", "use_mems_eval", "use_mems_train", "return_dict"))
"""What `arguments_of` makes an argument of each call, so that it is no part of a graph besides."""

_PROBLEM = "problem_type"

Reads = set[tuple[type, str]]
"""Classes of configs, and attributes of theirs."""


class _Recording:
    """Goes before a class of configs: it records what is read of its instances.

    Captures copy the configs of a model with their classes, so that their reads are recorded too.
    """

    recorded: type
    reads: Reads | None
    """Of the capture of now; one thread alone captures."""

    def __init_subclass__(cls) -> None:
        """Make the class as it is, where transformers would make a dataclass of it."""

    def __getattribute__(self, name: str) -> Any:
        cls: Any = type(self)
        if cls.reads is not None and not name.startswith("__"):
            cls.reads.add((cls.recorded, name))
        return super().__getattribute__(name)


@functools.cache
def _recording(kind: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "recorded": kind, "reads": None}
    return type(kind.__name__, (_Recording, kind), names)


@contextmanager
def recorded_reads(model: nn.Module) -> Iterator[Reads]:
    """Yield a set that gets what is read inside of the configs of `model`, a copy, and of copies of these."""
    reads: Reads = set()
    configs: list[Any] = list({id(config): config for _, _, config in _configs_of(model)}.values())
    kinds = [_recording(config.__class__) for config in configs]
    for config, kind in zip(configs, kinds, strict=True):
        config.__class__ = kind
        kind.reads = reads
    try:
        yield reads
    finally:
        for config, kind in zip(configs, kinds, strict=True):
            config.__class__ = kind.recorded
            kind.reads = None


_ABSENT: Any = object()


@dataclass
class ConfigValues:
    """The configs that a graph was captured with, and what it has of them.

    Args:
        configs: the attributes of what has a config, the name of that attribute, and the config.
        values: the attributes of a config, the name of one of them, and its value.
        decided: the config in which a call with labels decides the kind of loss, if that is open, and that kind.
    """

    configs: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    values: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    decided: tuple[Any, str] | None = None

    @classmethod
    def of(cls, model: nn.Module, reads: Reads, decided: tuple[Any, str] | None) -> ConfigValues:
        """Return the numbers among what a capture of a copy of `model` read, as its configs have them now."""
        if decided is not None and (type(decided[0]), _PROBLEM) not in reads:
            decided = None
        captured = cls(_configs_of(model), [], decided)
        for config in {id(config): config for _, _, config in captured.configs}.values():
            names, has = getattr(config, "attribute_map", {}), vars(config)
            for kind, read in sorted(reads, key=lambda each: each[1]):
                name = names.get(read, read)
                if kind is not type(config) or name in _CALLS_FOLLOW:
                    continue
                # One that is absent may be set later; what the class has are methods, and defaults as good as absent.
                value = has.get(name, _ABSENT)
                if value is _ABSENT or _is_plain(value):
                    kept = value if value is _ABSENT else copy.deepcopy(value)
                    captured.values.append((has, name, captured._seen(has, name, kept)))
        return captured

    def decide(self) -> None:
        """Write the kind of loss to the config where it is open, as the model does, for all later calls too."""
        if self.decided is not None and getattr(self.decided[0], _PROBLEM) is None:
            setattr(self.decided[0], _PROBLEM, self.decided[1])

    def _seen(self, attributes: Mapping[str, Any], name: str, value: Any) -> Any:
        """Return what a call sees of a value: where the kind of loss is open, that which the call decides for."""
        if value is None and name == _PROBLEM and self.decided is not None and attributes is vars(self.decided[0]):
            return self.decided[1]
        return value

    def change(self) -> str:
        """Return in words what is different now; empty if nothing is. Calls that torch.compile traces ask, too."""
        for attributes, name, config in self.configs:
            if attributes.get(name) is not config:
                return f"{name} is another object than before"
        for attributes, name, value in self.values:
            now = self._seen(attributes, name, attributes.get(name, _ABSENT))
            if now is not value and now != value:
                if torch.compiler.is_dynamo_compiling():  # it may take numbers for symbols, which have no words
                    return f"config.{name} is another"
                return f"config.{name} is {_shown(now)}, and was {_shown(value)}"
        return ""


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def _configs_of(model: nn.Module) -> list[tuple[Mapping[str, Any], str, Any]]:
    """Return the configs that the modules of a model have, and those that these have, each with where it is."""
    found: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
    for module in model.modules():
        config = vars(module).get("config")
        inside = getattr(config, "__dict__", {})
        for attributes, name in ((vars(module), "config"), *((inside, name) for name in inside)):
            if hasattr(attributes.get(name), "get_text_config"):
                found[id(attributes), name] = attributes, name, attributes[name]
    return list(found.values())


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, or consists of numbers."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))
