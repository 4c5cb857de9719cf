"""The modules that PEFT targets in a model if a config names none, or "all-linear"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import ConfigError, is_instance_of

_HEADS = ("score", "classifier")
"""What PEFT calls the heads of classifiers, which "all-linear" leaves out."""


def depends_on_model(targets: object) -> bool:
    """Return whether `target_modules` has another meaning for each model."""
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def with_targets_of(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a config whose `target_modules` are those of `model`, as PEFT chooses them.

    Raises:
        ConfigError: PEFT has no default targets for such a model, or is not installed, which has the tables of them.
    """
    resolved = dict(config)
    targets = config.get("target_modules")
    if isinstance(targets, str) and depends_on_model(targets):
        resolved["target_modules"] = _all_linear(model, config.get("task_type"))
    elif targets is None and not config.get("target_parameters"):
        kind = config.get("peft_type")
        method = str(getattr(kind, "value", kind))
        if method != "TRAINABLE_TOKENS":  # whose default is the embedding, here too
            resolved["target_modules"] = _default(method.replace("LN_", "LN"), "TARGET", model)
        if method == "IA3" and config.get("feedforward_modules") is None:
            resolved["feedforward_modules"] = _default(method, "FEEDFORWARD", model)
    return resolved


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


def _default(method: str, what: str, model: nn.Module) -> list[str]:
    """Return PEFT's default targets of a method for a model of this type."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = f"TRANSFORMERS_MODELS_TO_{method}_{what}_MODULES_MAPPING"
    try:
        tables = importlib.import_module("peft.utils.constants")
    except ImportError as error:
        raise ConfigError(
            f"PEFT's default targets of {method} are in its own tables: install peft, or name them."
        ) from error
    targets = getattr(tables, table, {}).get(kind)
    if targets is None:
        raise ConfigError(
            f"PEFT has no default targets of {method} for a model of the type {kind!r}: name the modules."
        )
    return sorted(targets)
