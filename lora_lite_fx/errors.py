"""The errors that this library raises on bad input, and how their messages show values.

All errors derive from `AdapterError`.
"""

from __future__ import annotations

import os
import reprlib

COMPILE_INSTEAD = (
    "run torch.compile(lora_lite_fx.backend(cfg).adapt(model, *inputs), backend='lora_lite_fx'), which needs no graph"
    " of the whole"
)
"""The way out for a model that cannot be captured as one graph for both modes."""


class AdapterError(Exception):
    """Any failure that `lora_lite_fx` reports.

    The message says what was wrong, where, and what would be right.
    """


class ConfigError(AdapterError, ValueError):
    """A variant's fields are invalid, or do not fit the site they are applied to; or a pipeline's passes are."""


class SelectionError(AdapterError, ValueError):
    """The targets of a config match no site of the model."""


class CaptureError(AdapterError, RuntimeError):
    """The model cannot be captured as a graph with the given inputs."""


class CallError(AdapterError, TypeError):
    """A captured graph was called in a way that it does not serve; the message says which calls it serves."""


class CheckpointError(AdapterError, RuntimeError):
    """An adapter file is unreadable, or does not fit the model."""


class _Short(reprlib.Repr):
    """`repr` for messages: a few elements and characters, and of an object in a container only its class."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x) if x is None or isinstance(x, (float, complex, bytes)) else f"<{type(x).__name__}>"


_PLAIN = (str, bytes, int, float, complex, list, tuple, set, frozenset, dict, os.PathLike, type(None))


def shown(value: object) -> str:
    """Return `value` as an error message shows it: short, and never a whole model.

    Values of Python's own types are written as code, `['a', 1]`; a class is `the class LoRA`, and anything else is
    named by its class, `a Linear`.
    """
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, _PLAIN) and type(value).__module__ == "builtins":
        return _Short().repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 site`, `2 sites`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def is_instance_of(value: object, package: str, *names: str) -> bool:
    """Tell whether a class of `value` comes from `package` and has one of these names, or any name if none is given.

    The package is not imported for that, so it need not be installed.
    """
    return any(
        cls.__module__.split(".")[0] == package and (not names or cls.__name__ in names) for cls in type(value).__mro__
    )
