"""PEFT's methods that train weights themselves and nothing beside them: LN-tuning and trainable tokens.

What they train is what `beside.py` has beside an adapter, under other keys. So a directory is read and written by way of
that: here are the keys and the configs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...variants import Full, TrainableTokens
from .beside import PREFIX, TOKENS, WholeFields
from .target_modules import START, covering, name_patterns, target_patterns

_LAYER = ".ln_tuning_layers."
_OF_COPY = re.compile(re.escape(_LAYER) + r"(default\.)?")
_ROWS = ".trainable_tokens_delta"
_LN_TUNING, _TRAINABLE_TOKENS = "LN_TUNING", "TRAINABLE_TOKENS"
WHOLE_ONLY = (_LN_TUNING, _TRAINABLE_TOKENS)


def method_of(config: Mapping[str, Any]) -> str:
    """Return PEFT's name of the method of a config."""
    kind = config.get("peft_type")
    return str(getattr(kind, "value", kind))


def own_fields(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of a config of one of these methods that are read beside its targets."""
    return frozenset({"token_indices", "init_weights"} if method_of(config) == _TRAINABLE_TOKENS else {})


def whole_config(config: Mapping[str, Any], new: bool) -> Full | TrainableTokens:
    """Return the variant that a config of one of these methods describes.

    Args:
        config: the config.
        new: whether it is for a new adapter.

    Raises:
        ConfigError: a field has an impossible value, or asks for a start that there is not here.
    """
    if method_of(config) == _LN_TUNING:
        excluded = name_patterns(config.get("exclude_modules") or (), "exclude_modules", "Full", START)
        excluded += WholeFields.of(config, "Full").excluded
        inside = (f"{pattern.removesuffix('$')}(\\..*)?$" for pattern in target_patterns(config, "Full", new))
        return Full(target_names=tuple(inside), exclude_names=excluded)
    ids = config.get("token_indices")
    if new and config.get("init_weights", True) is not True:
        raise ConfigError("TrainableTokens: rows start as copies, as with PEFT's init_weights=True.")
    if not isinstance(ids, (list, tuple)):
        raise ConfigError(f"TrainableTokens: PEFT's token_indices must be a list of ids, got {ids!r}.")
    if config.get("target_modules") is None:
        return TrainableTokens(token_indices=tuple(ids))
    names = target_patterns(config, "TrainableTokens", new)
    return TrainableTokens(token_indices=tuple(ids), target_names=names, target_kinds=("embedding", "linear"))


def as_beside(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[WholeFields, dict[str, Tensor]]:
    """Return the fields and tensors of a directory as if an adapter were beside them.

    Raises:
        CheckpointError: a key is not of such a directory.
    """
    modules: set[str] = set()
    tokens: dict[str, tuple[int, ...]] = {}
    beside: dict[str, Tensor] = {}
    fields = WholeFields.of(config, "Full")
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{path}: {key} cannot be represented here.")
        if key.endswith(_ROWS) and method_of(config) == _TRAINABLE_TOKENS:
            name = key.removeprefix(PREFIX).removesuffix(_ROWS).replace(".base_layer", "")
            tokens[name] = tuple(config["token_indices"])
            beside[f"{PREFIX}{name}{TOKENS}"] = tensor
        elif _LAYER in key:
            modules.add(key.removeprefix(PREFIX).partition(_LAYER)[0])
            beside[_OF_COPY.sub(".", key, 1)] = tensor
        else:
            beside[key] = tensor
    return WholeFields((*fields.modules, *sorted(modules)), "none", tokens), beside


def as_own(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of a directory without an adapter: the inverse of `as_beside`.

    Args:
        fields, tensors: as `write_whole` returns them.
        names: of the model's modules.

    Raises:
        ConfigError: PEFT has no method that trains these alone.
    """
    config: dict[str, Any] = {"inference_mode": True}
    saved, tokens = fields.get("modules_to_save"), fields.get("trainable_token_indices", {})
    if len(fields) > 1 or not (saved or tokens):
        raise ConfigError(
            "PEFT trains whole modules (LN_TUNING) or tokens (TRAINABLE_TOKENS) without an adapter, and not"
            f" {' and '.join(sorted(fields))}."
        )
    if saved:
        config |= {"peft_type": _LN_TUNING, "target_modules": covering(saved, names)}
        ends = {
            f"{PREFIX}{name}.{leaf}": f"{PREFIX}{name}{_LAYER}{leaf}" for name in saved for leaf in ("weight", "bias")
        }
        return config, {ends[key]: tensor for key, tensor in tensors.items()}
    ids = list(dict.fromkeys(map(tuple, tokens.values())))
    if len(ids) > 1:
        raise ConfigError("TrainableTokens: PEFT trains the same tokens of all embeddings, and here they differ.")
    config |= {"peft_type": _TRAINABLE_TOKENS, "target_modules": covering(list(tokens), names)}
    config["token_indices"] = list(ids[0])
    return config, {key.removesuffix(TOKENS) + _ROWS: tensor for key, tensor in tensors.items()}
