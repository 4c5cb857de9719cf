"""Insert adapters inside `torch.compile`, for models that export cannot capture.

`backend` is the door for a model as it is, `adapt_compiled` for one call that returns the adapted copy. Start here: a
graph that Dynamo captures comes to `Backend.__call__`, which hands it to one of two places. `marked_graph` compiles the
graphs of a model that carries its adapters, `compiled_model` those of a model that is compiled as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from ..adapters.bank import check_no_bank
from ..adapters.quantized_base import check_gradients
from ..adapters.variant import Variant
from ..capture.capture import Inputs
from ..errors import AdapterError, ConfigError, shown
from ..log import phase
from ..rewriting.config import Config, as_adapters
from ..storage.dequantized import stand_ins
from .compiled_model import CompiledModel
from .dynamo_call import on_compilation, running_call
from .dynamo_graph import Compiled, Compiler
from .inner import Inner
from .marked_graph import compile_marked, has_marks

NAME = "lora_lite_fx"
"""The name under which torch.compile knows the backend for models that carry their adapters."""


def backend(
    cfg: Config | None = None,
    *,
    inner: str | Compiler = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backend:
    """Return a backend for `torch.compile` that inserts adapters into the graphs that Dynamo captures.

    `torch.compile(model, backend=backend(cfg))` runs the adapted model. `model` itself is not changed: a call of it
    runs without adapters. A model that breaks into several graphs is adapted in each of them.

    The first call decides on the sites: the model runs once more on the inputs of the call, and the linears that ran
    are its sites. From then on the adapters are those of the backend's `model`; give their parameters to an optimizer.
    `Backend.adapt` decides on the sites before the first call.

    A site that would run outside the graphs is an error that names it. There is no error where torch.compile does
    nothing at all: where it is switched off, or leaves out the whole `forward` of the model. A model that carries its
    adapters never runs without them; it can be part of other modules and of compiled functions. Where its layers break
    into graphs, each has a graph of its own, which `torch._dynamo.config.recompile_limit` must allow.

    Parameters of `model` that are used between its graphs get gradients if they require them: freeze the model.

    Args:
        cfg: a variant, or several, as for `rewrite`. None for a model that carries its adapters; the name
            `backend="lora_lite_fx"` stands for that.
        inner: the backend that compiles the rewritten graphs, or its name.
        mode, options: settings of `inner`, as `torch.compile` takes them. They may also be given to `torch.compile`
            beside this backend: `torch.compile(model, backend=backend(cfg), mode="reduce-overhead")`.

    Raises:
        ConfigError: `cfg` is not a variant; or there is no such `inner`, `mode` or option.
    """
    if isinstance(cfg, nn.Module):
        raise ConfigError(
            f"backend takes the config of the adapters, and {shown(cfg)} is a model. The call is"
            " torch.compile(model, backend=backend(LoRA(r=8)))."
        )
    if inner == NAME or isinstance(inner, Backend):
        raise ConfigError(f"inner compiles graphs that have their adapters, and {NAME!r} inserts them: leave it out.")
    adapters = () if cfg is None else tuple(as_adapters(cfg))
    check_no_bank((variant for _, variant in adapters), "backend", "The way out: rewrite or adapt, which compile too.")
    return Backend(adapters, Inner(inner, mode, options))


class Backend:
    """A backend that inserts adapters, see `backend`; Dynamo calls it with each graph.

    The compiled model raises errors of this library where the graph would have run:

    - SelectionError, ConfigError: as `rewrite` raises them, at the first call.
    - AdapterError: a site would run without its adapters, because it is outside the graphs or did not run in the first
      call.

    Args:
        adapters: to be inserted, by name and in this order; empty for models that carry their adapters.
        inner: the backend that compiles the rewritten graphs, with its settings.
    """

    def __init__(self, adapters: tuple[tuple[str, Variant], ...], inner: Inner) -> None:
        self.adapters = adapters
        self.inner = inner
        self._compiled: CompiledModel | None = None
        if adapters:
            on_compilation(self._begin)

    @property
    def model(self) -> nn.Module | None:
        """The copy of the compiled model that carries the adapters; None before the first call. It shares the weights.

        `adapter_parameters`, `adapter_state_dict`, `save` and the like take it. It runs by
        `torch.compile(model, backend="lora_lite_fx")`.
        """
        return None if self._compiled is None else self._compiled.marked

    def adapt(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Decide on the sites before the first call, and return the copy that carries the adapters.

        Args:
            model: the model to be compiled with this backend; it is not changed.
            args, kwargs: inputs of its `forward`, on which it runs once.

        Raises:
            SelectionError: a config's targets match no site.
            ConfigError: a config does not fit a site, a site is not a module of its own, or gradients do not pass
                through the frozen weights.
        """
        check_gradients(model)
        self._compiled = CompiledModel(model, self.adapters, args, kwargs)
        return self._compiled.marked

    def __eq__(self, other: object) -> bool:
        """Return whether Dynamo may run code that it compiled for `other`: it asks in calls of another `torch.compile`.

        It may not until the sites are watched, because only when it compiles does Dynamo say that such a call began.
        """
        return self is other and (self._compiled is None or self._compiled.watch.active)

    __hash__ = object.__hash__

    def __call__(
        self,
        gm: fx.GraphModule,
        inputs: list[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compile one graph that Dynamo captured, with the adapters in it.

        Args:
            gm: the graph.
            inputs: Dynamo's example inputs.
            mode, options: given to `torch.compile`, which passes them on.
        """
        try:
            inner = self.inner.given(mode, options).compiler()
            is_marked = not self.adapters or has_marks(gm)
            if not is_marked:
                self._start()
            with phase("derived the program of a graph") as details:
                details.append(f"{len(gm.graph.nodes)} nodes")
                if is_marked:
                    return compile_marked(gm, inputs, inner)
                if self._compiled is None:
                    raise AdapterError(
                        "backend(cfg) must be given to torch.compile itself, not be called by another one."
                    )
                return self._compiled.compile(gm, inputs, inner)
        except AdapterError as error:
            return _raising(error)  # later and as it is, because Dynamo wraps the errors of a backend

    def _begin(self) -> None:
        with suppress(AdapterError):  # raised again where the first graph would run
            self._start()

    def _start(self) -> None:
        """Decide on the sites and watch them, if a call begins of a model that is compiled with this backend."""
        call = running_call()
        if call is None or call.backend is not self:
            return
        if self._compiled is None:
            if call.model is None:
                raise AdapterError(
                    "backend(cfg) was given to torch.compile with a function. It finds sites by their names in a model:"
                    " compile the model or its forward, or a function that calls an adapted model."
                )
            self.adapt(call.model, *call.args, **call.kwargs)
        assert self._compiled is not None
        if quantized := stand_ins(self._compiled.marked):
            raise AdapterError(
                f"torch.compile captures how a library multiplies with its weights ({next(iter(quantized))}, ...), and"
                " an adapter has no place there. The way out: compile the backend's model, which multiplies with the"
                ' weights in plain sight, torch.compile(backend.adapt(model, *inputs), backend="lora_lite_fx").'
            )
        if call.started is not None and not self._compiled.watch.active:
            raise AdapterError(
                f"torch.compile captures nothing up to {call.started}, which may have run sites without their adapters"
                " by now. The way out: compile the backend's model, which carries its adapters, with"
                ' backend="lora_lite_fx"; or, after torch._dynamo.reset(), make a new backend.'
            )
        self._compiled.watch.watch(call)


compile_graph = backend()
"""The backend that is registered under `NAME`."""


def adapt_compiled(
    model: nn.Module, cfg: Config, example_inputs: Inputs, *, inner: str | Compiler = "inductor"
) -> nn.Module:
    """Return a copy of `model` that carries adapters and runs compiled, for a model that export cannot capture.

    Args:
        model: any module; it is not changed.
        cfg: a variant, or several, as for `rewrite`.
        example_inputs: a tuple of positional or a dict of keyword arguments. The model runs on them once, and the
            linears that run can be adapted.
        inner: the backend that compiles the rewritten graphs, or its name.

    Returns:
        The copy, of the same class and with the weights shared. Only the adapters' parameters require grad.

    Raises:
        SelectionError: a config's targets match no site.
        ConfigError: `cfg` is not a variant, or does not fit a site; or a site is not a module of its own.
    """
    args, kwargs = (example_inputs, {}) if isinstance(example_inputs, tuple) else ((), example_inputs)
    check_gradients(model)
    adapters = as_adapters(cfg)
    check_no_bank(
        (variant for _, variant in adapters), "adapt_compiled", "The way out: rewrite or adapt, which compile too."
    )
    marked = CompiledModel(model, adapters, args, kwargs).marked
    marked.forward = torch.compile(marked.forward, backend=backend(inner=inner))
    return marked


def _raising(error: AdapterError) -> Compiled:
    """Return a function that raises `error`, in the place of a compiled graph."""

    def run(*inputs: Any) -> Any:
        raise error

    return run
