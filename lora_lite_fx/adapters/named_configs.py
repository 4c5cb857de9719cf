"""The configs that `rewrite`, `wrap`, `adapt` and `backend` take: one variant, several, or several by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from ..errors import ConfigError, is_instance_of, shown
from ..graph.insertion import DEFAULT
from .registry import registry
from .variant import Variant


@runtime_checkable
class PeftConfig(Protocol):
    """A config of PEFT, as a `peft.LoraConfig`."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""


AdapterConfig = Variant | PeftConfig | Sequence[Variant | PeftConfig]
Config = AdapterConfig | Mapping[str, AdapterConfig]
"""A variant, several to insert in this order, or a dict that names adapters: `{"fr": LoRA(r=8), "de": [IA3()]}`.

A config of PEFT may stand in the place of a variant.
"""
Reader = TypeVar("Reader", bound=Callable[..., Variant | list[Variant]])
_READERS: list[Callable[..., Variant | list[Variant]]] = []
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def reads_peft_configs(reader: Reader) -> Reader:
    """Let a function read the configs of PEFT. It stands in a wing above this one, with all that is known of PEFT.

    Args:
        reader: takes a config and the model to adapt, or None, and returns the variants.
    """
    _READERS[:] = [reader]
    return reader


def as_adapters(cfg: Config, model: Any = None) -> list[tuple[str, Variant]]:
    """Return the variants of a config in the order of insertion, each with the name of its adapter.

    Args:
        cfg: the config.
        model: the model to adapt, which a config of PEFT may depend on; None if it is not known.

    Raises:
        ConfigError: `cfg` is empty, a name cannot be one, or an element is not a variant; or as `from_peft_config`.
    """
    if not isinstance(cfg, Mapping):
        return [(DEFAULT, variant) for variant in _as_variants(cfg, model)]
    if not cfg or not all(isinstance(value, (Variant, PeftConfig, list, tuple)) for value in cfg.values()):
        raise not_a_variant(cfg)
    return [(check_name(name), variant) for name, each in cfg.items() for variant in _as_variants(each, model)]


def _as_variants(cfg: AdapterConfig, model: Any) -> list[Variant]:
    variants: list[Variant] = []
    for item in cfg if isinstance(cfg, Sequence) and not isinstance(cfg, str) else [cfg]:
        if isinstance(item, Variant):
            variants.append(item)
        elif isinstance(item, PeftConfig) and not isinstance(item, type):
            read = _READERS[0](item, model if isinstance(model, nn.Module) else None)
            variants += [read] if isinstance(read, Variant) else read
        else:
            raise not_a_variant(item)
    if not variants:
        raise not_a_variant(cfg)
    return variants


def check_name(name: object) -> str:
    """Return the name of an adapter.

    Raises:
        ConfigError: it cannot be one.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ConfigError(
        f"The name of an adapter is of letters, digits and underscores and does not begin with a digit, because the"
        f" names of its tensors end in it; not {name!r}."
        if isinstance(name, str)
        else f"The name of an adapter is a string, as in rewrite(model, {{'fr': LoRA(r=8)}}), not {shown(name)}."
    )


def check_free(names: Iterable[str], present: Sequence[str]) -> None:
    """Raise ConfigError if a name is that of an adapter which is there already."""
    if taken := [name for name in names if name in present]:
        raise ConfigError(
            f"The model has an adapter {taken[0]!r} already; it has {', '.join(present)}. The way out: another name, or"
            f" delete(model, {taken[0]!r}) first."
        )


def not_a_variant(cfg: object) -> ConfigError:
    """Return the error for `cfg`, which is not a variant."""
    what = {"[]": "an empty list", "{}": "an empty dict"}.get(repr(cfg)) or shown(cfg)
    return ConfigError(
        f"cfg must be a variant such as LoRA(r=8), a list of them, or a dict of such by names, not {what}.{_hint(cfg)}"
    )


def _hint(cfg: object) -> str:
    if isinstance(cfg, (str, os.PathLike)):
        return _hint_for_text(os.fspath(cfg))
    if isinstance(cfg, type):
        return f" Pass an instance: {cfg.__name__}()." if issubclass(cfg, Variant) else ""
    if isinstance(cfg, nn.Module):
        return " It is a model, which comes first: rewrite(model, LoRA(r=8))."
    if is_instance_of(cfg, "peft", "PeftConfigMixin"):
        return " It is a config of PEFT: pass llfx.from_peft_config(cfg)."
    if isinstance(cfg, Mapping):
        if "peft_type" in cfg:
            return " It is a config of PEFT: pass llfx.from_peft_config(cfg)."
        return " Make a config of these fields: LoRA(**cfg)." if cfg else ""
    if isinstance(cfg, (set, frozenset)):
        return " A set has no order; pass a list."
    if is_instance_of(cfg, "transformers", "PreTrainedConfig", "PretrainedConfig"):
        return " It is the config of a model; cfg is the config of the adapters."
    if hasattr(cfg, "__next__"):
        return " Make a list of it: [*cfg]."
    return ""


def _hint_for_text(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        return f" It is a folder: llfx.load_peft(model, {text!r}) loads the adapter of a PEFT directory."
    if path.exists():
        return f" It is a file: llfx.load(model, {text!r}) loads the adapters that llfx.save wrote."
    names = {name.lower(): name for name in registry()}
    close = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.7)
    if close:
        return f" Pass a config: llfx.{names[close[0]]}()."
    return f" The variants are {', '.join(sorted(registry()))}."
