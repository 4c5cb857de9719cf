"""Checks of the config that a user passes: what is wrong with it, and what would be right."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..errors import ConfigError, is_instance_of, shown
from .registry import registry
from .variant import Variant


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
