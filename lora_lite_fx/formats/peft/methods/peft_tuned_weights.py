"""PEFT's methods that train weights themselves and nothing beside them: LN-tuning and trainable tokens.

What they train is what `../beside.py` has beside an adapter, under other keys. So a directory is read and written by
way of that: here are the keys and the configs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....adapters.variant import Variant
from ....errors import CheckpointError, ConfigError
from ....variants import Full, TrainableTokens
from ..beside import PREFIX, TOKENS, BesideFields
from ..form import PeftAdapter, PeftForm
from ..target_modules import covering, excluded_patterns, target_patterns

_LAYER = ".ln_tuning_layers."
_OF_COPY = re.compile(re.escape(_LAYER) + r"(default\.)?")
_ROWS = ".trainable_tokens_delta"


class _WeightsForm(PeftForm):
    def read(self, adapter: PeftAdapter) -> PeftAdapter:
        """Return the fields and tensors of a directory as if an adapter were beside them."""
        modules: set[str] = set()
        tokens: dict[str, tuple[int, ...]] = {}
        beside: dict[str, Tensor] = {}
        for key, tensor in adapter.tensors.items():
            if not key.startswith(PREFIX):
                raise CheckpointError(f"{adapter.path}: {key} cannot be represented here.")
            if key.endswith(_ROWS) and self.variant is TrainableTokens:
                name = key.removeprefix(PREFIX).removesuffix(_ROWS).replace(".base_layer", "")
                tokens[name] = tuple(adapter.config["token_indices"])
                beside[f"{PREFIX}{name}{TOKENS}"] = tensor
            elif _LAYER in key:
                modules.add(key.removeprefix(PREFIX).partition(_LAYER)[0])
                beside[_OF_COPY.sub(".", key, 1)] = tensor
            else:
                beside[key] = tensor
        saved = BesideFields.of(adapter.config, self.name).modules
        return replace(adapter, beside=beside, fields=BesideFields((*saved, *sorted(modules)), "none", tokens))


class _LNTuning(_WeightsForm):
    def default_tables(self) -> dict[str, str]:
        return {"target_modules": "LNTUNING_TARGET"}

    def variant_of(self, config: Mapping[str, Any], new: bool) -> Variant:
        excluded = (*excluded_patterns(config, self.name), *BesideFields.of(config, self.name).excluded)
        inside = tuple(f"{pattern.removesuffix('$')}(\\..*)?$" for pattern in target_patterns(config, self.name, new))
        self.check_fields(config)
        return Full(target_names=inside, exclude_names=excluded)


class _TrainableTokens(_WeightsForm):
    def default_tables(self) -> dict[str, str]:
        return {}  # the default is the embedding, here too

    def variant_of(self, config: Mapping[str, Any], new: bool) -> Variant:
        ids = config.get("token_indices")
        if new and config.get("init_weights", True) is not True:
            raise ConfigError("TrainableTokens: rows start as copies, as with PEFT's init_weights=True.")
        if not isinstance(ids, (list, tuple)):
            raise ConfigError(f"TrainableTokens: PEFT's token_indices must be a list of ids, got {ids!r}.")
        self.check_fields(config, ("token_indices",))
        if config.get("target_modules") is None:
            return TrainableTokens(token_indices=tuple(ids))
        names = target_patterns(config, self.name, new)
        return TrainableTokens(token_indices=tuple(ids), target_names=names, target_kinds=("embedding", "linear"))


def as_method(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of a directory without an adapter: the inverse of reading one.

    Args:
        fields, tensors: as `write_beside` returns them.
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
        config |= {"peft_type": _LN_TUNING.peft_type, "target_modules": covering(saved, names)}
        ends = {
            f"{PREFIX}{name}.{leaf}": f"{PREFIX}{name}{_LAYER}{leaf}" for name in saved for leaf in ("weight", "bias")
        }
        return config, {ends[key]: tensor for key, tensor in tensors.items()}
    ids = list(dict.fromkeys(map(tuple, tokens.values())))
    if len(ids) > 1:
        raise ConfigError("TrainableTokens: PEFT trains the same tokens of all embeddings, and here they differ.")
    config |= {"peft_type": _TOKENS.peft_type, "target_modules": covering(list(tokens), names)}
    config["token_indices"] = list(ids[0])
    return config, {key.removesuffix(TOKENS) + _ROWS: tensor for key, tensor in tensors.items()}


_LN_TUNING = _LNTuning(Full, "LN_TUNING", {}, {}, start="", beside_only=True)
_TOKENS = _TrainableTokens(TrainableTokens, "TRAINABLE_TOKENS", {}, {}, beside_only=True)
FORMS = (_LN_TUNING, _TOKENS)
