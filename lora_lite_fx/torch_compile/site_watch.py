"""Notice sites that run in Python while a compiled model runs, where they would run without their adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .dynamo_call import RunningCall
from .marked_model import runs_outside


class SiteWatch:
    """A watch over the adapted sites of a model that is compiled as it is.

    Torch calls the watch's hooks with each module that is called from Python. A site that has just run in a graph has
    had its adapters. Any other site is run again, by the copy that carries the adapters: if Dynamo still captures what
    is called, the site gets a graph of its own; if not, the copy raises the error that names the site.

    Args:
        model: the model that is compiled; it is not changed.
        marked: its copy that carries the adapters.
        sites: the names of the adapted sites.
    """

    def __init__(self, model: nn.Module, marked: nn.Module, sites: Iterable[str]) -> None:
        self.marked = marked
        self.sites = {id(model.get_submodule(name)): name for name in sites}
        self.ran: set[str] = set()
        """The sites that have run in a graph since they were called."""
        # For all modules, because hooks on the model's own modules would change the model.
        self.hooks = HooksOnAllModules(partial(_before, self), partial(_after, self))
        self.local = threading.local()

    @property
    def active(self) -> bool:
        """Tell whether a watched call runs in this thread."""
        return getattr(self.local, "active", False)

    def watch(self, call: RunningCall) -> None:
        """Watch the rest of this call, and all later ones of the same compiled function."""
        if not self.active:
            call.within(self._activated)

    @contextmanager
    def _activated(self) -> Iterator[None]:
        self.local.active = True
        try:
            with self.hooks():
                yield
        finally:
            self.local.active = False


# Functions and not methods, because Dynamo inlines the hooks where it captures a module.


def _before(watch: SiteWatch, module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and watch.active and id(module) in watch.sites:
        watch.ran.discard(watch.sites[id(module)])


def _after(watch: SiteWatch, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not torch.compiler.is_compiling() and watch.active and id(module) in watch.sites:
        site = watch.sites[id(module)]
        if site not in watch.ran:
            if not args:  # they were passed by keyword, which hooks for all modules are not told
                raise runs_outside(site)
            return watch.marked.get_submodule(site)(*args)
    return output


class HooksOnAllModules:
    """Hooks that torch calls with every module, in the context that a call of this object returns.

    Args:
        before, after: as `torch.nn.modules.module.register_module_forward_pre_hook` and `..._forward_hook` take them.
    """

    def __init__(self, before: partial[Any], after: partial[Any]) -> None:
        _only_inlined(before.func, after.func)
        self.before, self.after = before, after
        handle = nn.modules.module.register_module_forward_pre_hook(before)
        self.key = handle.id
        handle.remove()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # Under a key that stays the same: Dynamo's graphs hold for certain keys, and the public functions take a new
        # one each time.
        places = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)
        for hooks, hook in zip(places, (self.before, self.after), strict=True):
            hooks[self.key] = hook
        try:
            yield
        finally:
            for hooks in places:
                del hooks[self.key]


def _only_inlined(*functions: Callable[..., Any]) -> None:
    """Let Dynamo trace these functions as parts of their callers only. Called from Python, they run in Python."""
    # Otherwise Dynamo compiles them by themselves, and `is_compiling` in them is true outside of any graph.
    for function in functions:
        torch._dynamo.eval_frame.skip_code(function.__code__)
