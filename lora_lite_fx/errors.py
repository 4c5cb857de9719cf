"""The errors this library raises on bad input. All derive from `AdapterError`."""


class AdapterError(Exception):
    """Any failure that `lora_lite_fx` reports; the message says what was wrong, where, and what would be right."""


class ConfigError(AdapterError, ValueError):
    """A variant's fields are invalid, or do not fit the site they are applied to."""


class SelectionError(AdapterError, ValueError):
    """The targets of a config match no site of the model."""


class CaptureError(AdapterError, RuntimeError):
    """The model cannot be captured as a graph with the given inputs."""


class CheckpointError(AdapterError, RuntimeError):
    """An adapter file is unreadable, or does not fit the model."""
