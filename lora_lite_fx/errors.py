"""The errors this library raises on bad input. All derive from `AdapterError`."""

from __future__ import annotations

COMPILE_INSTEAD = "run it by torch.compile(model, backend=lora_lite_fx.backend(cfg)), which needs no graph of the whole"
"""The way out for models that are not captured as one graph for both modes."""


class AdapterError(Exception):
    """Any failure that `lora_lite_fx` reports; the message says what was wrong, where, and what would be right."""


class ConfigError(AdapterError, ValueError):
    """A variant's fields are invalid, or do not fit the site they are applied to."""


class SelectionError(AdapterError, ValueError):
    """The targets of a config match no site of the model."""


class CaptureError(AdapterError, RuntimeError):
    """The model cannot be captured as a graph with the given inputs."""


class CallError(AdapterError, TypeError):
    """A captured graph was called in a way that it does not serve; the message says which calls it serves."""


class CheckpointError(AdapterError, RuntimeError):
    """An adapter file is unreadable, or does not fit the model."""
