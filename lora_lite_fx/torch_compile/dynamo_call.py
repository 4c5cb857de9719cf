"""The call that Dynamo compiles for."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

# The call that is going on.


@dataclass(frozen=True)
class RunningCall:
    """A call of a compiled function or module, while Dynamo compiles a graph for it.

    Args:
        model: the module that `torch.compile` was given, or whose method it was; None for a function.
        args, kwargs: of the call.
        backend: the one that `torch.compile` was given.
        started: the name of a function of the model that runs in Python meanwhile, or None.
    """

    model: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backend: object
    started: str | None
    _scope: Any
    _cleanups: list[Callable[[], object]]

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Enter `context()` in what is left of this call, and in all later ones of the same compiled function."""

        # Dynamo lets a backend have such a context (`backend_ctx_ctor`), but torch.compile does not look for it.
        def enter() -> Callable[[], object]:
            manager = context()
            manager.__enter__()
            return lambda: manager.__exit__(None, None, None)

        self._scope.enter_exit_hooks.append(enter)
        self._cleanups.append(enter())


def on_compilation(callback: Callable[[], None]) -> None:
    """Let `callback` be called whenever Dynamo starts to compile, for as long as its object lives."""
    # A backend is called with the first graph, before which the model may have run some way.
    method = weakref.WeakMethod(callback)
    handler = torch._dynamo.callback_handler

    def start(_: object) -> None:
        if (alive := method()) is not None:
            alive()

    def stop() -> None:
        if start in handler.start_callbacks:  # torch._dynamo.reset() takes them out
            handler.remove_start_callback(start)

    handler.register_start_callback(start)
    weakref.finalize(callback.__self__, stop)  # type: ignore[attr-defined]


class HooksOnAllModules:
    """Hooks that are called with all modules, where the context that a call of this returns is entered.

    Args:
        before, after: as `torch.nn.modules.module.register_module_forward_pre_hook` and `..._forward_hook` take them.
    """

    def __init__(self, before: partial[Any], after: partial[Any]) -> None:
        only_inlined(before.func, after.func)
        self.before, self.after = before, after
        handle = nn.modules.module.register_module_forward_pre_hook(before)
        self.key = handle.id
        handle.remove()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # Registered under a key that stays the same: Dynamo's graphs are for certain keys, and the public functions
        # take a new one each time.
        places = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)
        for hooks, hook in zip(places, (self.before, self.after), strict=True):
            hooks[self.key] = hook
        try:
            yield
        finally:
            for hooks in places:
                del hooks[self.key]


def only_inlined(*functions: Callable[..., Any]) -> None:
    """Let Dynamo trace these functions only as parts of what calls them: called from Python, they run in Python."""
    # Otherwise Dynamo compiles them by themselves, and they take themselves to be in a graph.
    for function in functions:
        torch._dynamo.eval_frame.skip_code(function.__code__)


def running_call() -> RunningCall | None:
    """The call that Dynamo compiles for, or None."""
    # A backend is given a graph and not the model it is of: only the stack knows that.
    started = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"] == "torch._dynamo.eval_frame":
            found = frame.f_locals
            function = inspect.unwrap(found["fn"])
            backend = torch._dynamo.eval_frame.innermost_backend(found["self"].callback)
            model = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
            return RunningCall(
                model if isinstance(model, nn.Module) else None,
                found["args"],
                found["kwargs"],
                # torch.compile wraps a backend to keep its options.
                getattr(backend, "compiler_fn", backend),
                started,
                found["self"],
                found["cleanups"],
            )
        if not _is_machinery(frame.f_globals.get("__name__", "")):
            started = frame.f_code.co_qualname
        frame = frame.f_back
    return None


def _is_machinery(module: str) -> bool:
    """Whether frames of a module named so are of compilation, and not of a model."""
    layers = module.startswith("torch.nn.") and module != "torch.nn.modules.module"
    return module.split(".")[0] in ("torch", "contextlib", "lora_lite_fx") and not layers
