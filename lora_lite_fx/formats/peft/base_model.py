"""The base of a PEFT directory: the fields of its config by which `AutoPeftModel` finds it, and its comparison."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

from ...capture.origins.origin import is_diffusers, is_hugging_face
from ...execution.optimize import execution_of

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}
"""PEFT's tasks by the end of the class name; the first that fits counts.

In its tasks of classification and answers PEFT wants a trained head in the file, so these models are left without one.
"""


FINGERPRINTS = "lora_lite_fx.base"
"""The key, in the metadata of the tensors, of the fingerprints of the base's weights by site. PEFT ignores it."""


def source_of(model: nn.Module) -> Any:
    """Return what tells the class and the config of an adapted model, or None if nothing does.

    Returns:
        The model, adapted or wrapped; of a graph, what it remembers of the model that it was captured from.
    """
    if is_hugging_face(model) or is_diffusers(model):
        return model
    made_from = execution_of(model).made_from
    return None if made_from is None else made_from.skeleton


def base_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a config that name the base of an adapted model and say what it does.

    Args:
        model: a graph, an adapted model or a wrapped one.
    """
    source = source_of(model)
    fields: dict[str, Any] = dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "auto_mapping"))
    if is_hugging_face(source):
        from ...compat.transformers import revision_of

        task = _task(source)
        # PEFT does the same for a model without a task.
        by_class = {"base_model_class": type(source).__name__, "parent_library": type(source).__module__}
        fields |= {"base_model_name_or_path": _name_of(source), "revision": revision_of(source.config)}
        fields |= {"task_type": task, "auto_mapping": None if task else by_class}
    return fields


def _name_of(source: Any) -> str | None:
    """Return under which name a model was loaded, a hub id or a folder; None if it was not loaded."""
    if not is_hugging_face(source):
        return None
    return source.config.name_or_path or getattr(source, "name_or_path", None) or None


def _task(source: Any) -> str | None:
    """Return PEFT's task for a model of transformers; None if PEFT has none, or would call the model in another way."""
    if source.main_input_name != "input_ids":
        return None
    task = next((task for end, task in _TASKS.items() if type(source).__name__.endswith(end)), None)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        has_encoder = bool(getattr(source.config, "is_encoder_decoder", False))
        right = hasattr(source, "prepare_inputs_for_generation") and has_encoder == (task == "SEQ_2_SEQ_LM")
        return task if right else None
    return task


def compare_names(gm: nn.Module, config: Mapping[str, Any], folder: PurePath) -> None:
    """Warn if the base that a config names has another name than the model of a graph, as far as both are known."""
    ours, theirs = _name_of(source_of(gm)), config.get("base_model_name_or_path")
    if not isinstance(theirs, str) or not theirs or not ours:
        return
    names = [PurePath(name).name.lower() for name in (theirs, ours)]
    if names[0] != names[1]:  # the folders may differ, as a hub id does from a copy on the disk
        warnings.warn(
            f"{folder}: the adapter was made for {theirs!r}, and the model was loaded from {ours!r}. If these are not"
            " the same weights, it computes something else than where it was trained.",
            stacklevel=4,
        )
