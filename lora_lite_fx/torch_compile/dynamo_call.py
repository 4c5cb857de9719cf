"""Find the call of a compiled model that Dynamo compiles a graph for.

Dynamo gives a backend a graph, and says nothing of the model that it is of, nor of its inputs: the stack does.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class RunningCall:
    """A call of a compiled function or module, while Dynamo compiles a graph for it.

    Args:
        model: the module that `torch.compile` was given, or whose method it was given; None for a function.
        args, kwargs: the arguments of the call.
        backend: the backend that `torch.compile` was given.
        started: the name of a function of the model that runs in Python meanwhile, or None.
        _scope: Dynamo's object for the compiled function.
        _cleanups: what Dynamo calls at the end of this call.
    """

    model: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backend: object
    started: str | None
    _scope: Any
    _cleanups: list[Callable[[], object]]

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Enter `context()` for the rest of this call, and in all later ones of the same compiled function."""

        # Dynamo lets a backend have such a context (`backend_ctx_ctor`), but torch.compile does not look for it.
        def enter() -> Callable[[], object]:
            manager = context()
            manager.__enter__()
            return lambda: manager.__exit__(None, None, None)

        self._scope.enter_exit_hooks.append(enter)
        self._cleanups.append(enter())


def on_compilation(callback: Callable[[], None]) -> None:
    """Let Dynamo call `callback`, a method, whenever it starts to compile, for as long as the method's object lives."""
    # A backend is first called with the first graph, before which the model may have run some way.
    method = weakref.WeakMethod(callback)
    handler = torch._dynamo.callback.callback_handler

    def start(_: object) -> None:
        if (alive := method()) is not None:
            alive()

    def stop() -> None:
        if start in handler.start_callbacks:  # torch._dynamo.reset() takes them out
            handler.remove_start_callback(start)

    handler.register_start_callback(start)
    weakref.finalize(callback.__self__, stop)  # type: ignore[attr-defined]


def running_call() -> RunningCall | None:
    """Return the call that Dynamo compiles a graph for, or None."""
    started = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"] == "torch._dynamo.eval_frame":
            variables = frame.f_locals
            function = inspect.unwrap(variables["fn"])
            backend = torch._dynamo.eval_frame.innermost_backend(variables["self"].callback)
            model = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
            return RunningCall(
                model if isinstance(model, nn.Module) else None,
                variables["args"],
                variables["kwargs"],
                # torch.compile wraps a backend to keep its options.
                getattr(backend, "compiler_fn", backend),
                started,
                variables["self"],
                variables["cleanups"],
            )
        if not _is_machinery(frame.f_globals.get("__name__", "")):
            started = frame.f_code.co_qualname
        frame = frame.f_back
    return None


def _is_machinery(module: str) -> bool:
    """Return whether the frames of a module of that name belong to compilation, and not to a model."""
    layers = module.startswith("torch.nn.") and module != "torch.nn.modules.module"
    return module.split(".")[0] in ("torch", "contextlib", "lora_lite_fx") and not layers
