"""The model that a graph was captured from: what is still to be known when the model is gone."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from .transformers_model import is_hugging_face, new_head


@dataclass(frozen=True)
class ModelReference:
    """A weak reference to a model, and how a Hugging Face model is found again. Calling it returns the model, or None.

    Args:
        model: the reference.
        class_name: of the model.
        module: the Python module in which the class is.
        name: under which the model was loaded, a hub id or a folder; None if it was not loaded.
        revision: the commit at the hub that was loaded, or None.
        reads: the name of its main input, such as `input_ids`; empty for another model than one of transformers.
        generates: whether it has what `generate` needs.
        has_encoder: whether it is an encoder with a decoder.
        new_head: the modules of its head that were drawn at random, see `hugging_face.new_head`.
    """

    model: weakref.ref[nn.Module]
    class_name: str
    module: str
    name: str | None = None
    revision: str | None = None
    reads: str = ""
    generates: bool = False
    has_encoder: bool = False
    new_head: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> ModelReference:
        """Return the source of a graph that is captured from `model`."""
        known: dict[str, Any] = {}
        if is_hugging_face(model):
            from ...compat.transformers import revision_of

            config: Any = model.config
            known = {
                "name": config.name_or_path or getattr(model, "name_or_path", None) or None,
                "revision": revision_of(config),
                "reads": getattr(model, "main_input_name", ""),
                "generates": hasattr(model, "prepare_inputs_for_generation"),
                "has_encoder": bool(getattr(config, "is_encoder_decoder", False)),
                "new_head": new_head(model),
            }
        return cls(weakref.ref(model), type(model).__name__, type(model).__module__, **known)

    def __call__(self) -> nn.Module | None:
        return self.model()
