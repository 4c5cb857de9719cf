"""The inner backend: it compiles the graphs that the adapters were inserted into, with the settings of the user."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import ConfigError, shown
from .dynamo_graph import Compiler


@dataclass(frozen=True)
class Inner:
    """A backend with its settings, as `torch.compile` takes them.

    Args:
        backend: a function that compiles a graph, or the name of one.
        mode: the name of a set of options of Inductor, such as `"reduce-overhead"`; or None.
        options: options of the backend by name, or None.

    Raises:
        ConfigError: there is no such backend, mode or option, or the backend does not take the settings.
    """

    backend: str | Compiler = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # The default is made when the package is imported, and would import Inductor then.
        if (self.backend, self.mode, self.options) != ("inductor", None, None):
            self.compiler()

    def given(self, mode: str | None, options: Mapping[str, Any] | None) -> Inner:
        """Return the backend with the settings that a call of `torch.compile` was given beside it.

        Raises:
            ConfigError: it has settings already, or these are not valid.
        """
        if mode is None and options is None:
            return self
        if self.mode is not None or self.options is not None:
            raise ConfigError(
                "torch.compile and backend(...) were both given a mode or options. The way out: give them to one."
            )
        return Inner(self.backend, mode, options)

    def compiler(self) -> Compiler:
        """Return the function that compiles a graph with these settings."""
        function = _looked_up(self.backend)
        # "default" is the mode without options, which torch.compile passes to no backend either.
        given = {"mode": None if self.mode == "default" else self.mode, "options": self.options or None}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if len(settings) > 1:
            raise ConfigError("mode is a set of options: give a mode or options, and not both.")
        if not settings:
            return function
        if self.backend == "inductor":
            return _inductor(**settings)
        _check_settings(self.backend, function, settings)
        return partial(function, **settings)


def _looked_up(backend: object) -> Compiler:
    if isinstance(backend, str):
        known = torch.compiler.list_backends(())
        if backend not in known:
            raise ConfigError(f"inner={backend!r} is not a backend of torch.compile.{_nearest(backend, known)}")
        from ..compat.dynamo import lookup_backend

        backend = lookup_backend(backend)
    if not callable(backend):
        raise ConfigError(
            f"inner is the backend that compiles the rewritten graphs: a function or a name such as 'inductor', not"
            f" {shown(backend)}."
        )
    compiler: Compiler = backend
    return compiler


def _inductor(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Compiler:
    """Return Inductor with a mode or options, which are checked."""
    from ..compat.dynamo import inductor_modes, inductor_options, inductor_with

    modes, known = inductor_modes(), inductor_options()
    if mode is not None and mode not in modes:
        raise ConfigError(f"mode={mode!r} is not a mode of torch.compile. The modes are {', '.join(modes)}.")
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options must be a dict of options of Inductor, not {shown(options)}.")
    for name in options or ():
        if str(name).replace("-", "_") not in known:
            raise ConfigError(f"options: {name!r} is not an option of Inductor.{_nearest(str(name), known)}")
    try:
        compiler: Compiler = inductor_with(mode, options, None)
    except RuntimeError as error:
        raise ConfigError(f"options: {error}.") from error
    return compiler


def _check_settings(backend: object, function: Compiler, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a backend other than Inductor does not take the settings."""
    try:
        inspect.signature(function).bind(None, None, **settings)
    except TypeError as error:
        name = repr(backend) if isinstance(backend, str) else getattr(backend, "__name__", shown(backend))
        raise ConfigError(f"The backend inner={name} does not take {' and '.join(settings)}: {error}.") from error
    except ValueError:  # it has no signature to look at
        return


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" The nearest: {', '.join(near)}." if near else f" There are {', '.join(list(known)[:10])}."
