"""`backend`: the same passes inside `torch.compile`, for models that export cannot capture."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from ..adapters.variant import Variant
from ..capture.capture import Inputs
from ..errors import AdapterError, ConfigError, shown
from ..rewriting.rewrite import Config, as_variants
from .compiled_model import CompiledModel
from .dynamo_call import on_compilation, running_call
from .dynamo_graph import Compiled, Compiler, compiler
from .marked_graph import compile_carried, has_marks


def backend(cfg: Config | None = None, *, inner: str | Compiler = "inductor") -> Backend:
    """A backend for `torch.compile` that inserts adapters into the graphs that Dynamo captures.

    `torch.compile(model, backend=backend(cfg))` runs the adapted model; `model` itself stays as it is, and a call of
    it is the base. What breaks into several graphs is adapted in each of them.

    The first call decides on the sites: the model runs once more on its inputs, and what ran is looked at. From then
    on the adapters are those of the backend's `model`, which an optimizer takes. `adapt` does this before.

    A site that would run outside the graphs is an error that names it. There is no error where torch.compile does
    nothing at all: switched off, or with a model whose whole `forward` it leaves out. A model that carries its adapters
    runs nowhere without them; it can be part of other modules and of compiled functions. Each of its layers has a graph
    of its own where the layers break, which `torch._dynamo.config.recompile_limit` must allow.

    Parameters of `model` that run between its graphs get gradients, if they require them: freeze it.

    Args:
        cfg: a variant, or several to insert in this order. None for a model that carries its adapters, which is what
            the name `backend="lora_lite_fx"` stands for.
        inner: the backend that compiles the rewritten graphs, by name or itself.

    Raises:
        ConfigError: `cfg` is no variant.
    """
    if isinstance(cfg, nn.Module):
        raise ConfigError(
            f"backend takes the config of the adapters, and {shown(cfg)} is a model. The call is"
            " torch.compile(model, backend=backend(LoRA(r=8)))."
        )
    return Backend(() if cfg is None else tuple(as_variants(cfg)), inner)


class Backend:
    """What `backend` returns; Dynamo calls it with each graph.

    In the compiled model an error of this library is raised where the graph would have run:

    - SelectionError, ConfigError: as by `rewrite`, at the first call.
    - AdapterError: a site would run without its adapters: outside the graphs, or as a site that was not there in the
      first call.

    Attributes:
        model: a copy of the compiled model that carries the adapters, with the weights shared; None before the first
            call. `adapter_parameters`, `adapter_state_dict`, `save` and the like take it, and
            `torch.compile(model, backend="lora_lite_fx")` runs it.
    """

    def __init__(self, variants: tuple[Variant, ...], inner: str | Compiler) -> None:
        self.variants = variants
        self.inner = inner
        self._base: CompiledModel | None = None
        if variants:
            on_compilation(self._begin)

    @property
    def model(self) -> nn.Module | None:
        return None if self._base is None else self._base.carrier

    def adapt(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Decide on the sites before the first call, on these inputs; returns the copy that carries the adapters.

        Args:
            model: the model to be compiled with this backend; it is not changed.
            args, kwargs: inputs of its `forward`.
        """
        self._base = CompiledModel(model, self.variants, args, kwargs)
        return self._base.carrier

    def __eq__(self, other: object) -> bool:
        """Whether Dynamo may run code that it compiled for `other`, which it asks in calls of another `torch.compile`.

        Not before the sites are watched: it would not say that such a call has begun. Compiling, it does.
        """
        return self is other and (self._base is None or self._base.watching)

    __hash__ = object.__hash__

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
        """Compile one graph of Dynamo's, with the adapters in it."""
        try:
            if not self.variants or has_marks(gm):
                return compile_carried(gm, inputs, compiler(self.inner))
            self._start()
            if self._base is None:
                raise AdapterError("backend(cfg) must be given to torch.compile itself, not be called by another one.")
            return self._base.compile(gm, inputs, compiler(self.inner))
        except AdapterError as error:
            return _raising(error)  # as it is: what a backend raises is wrapped by Dynamo

    def _begin(self) -> None:
        with suppress(AdapterError):  # raised again where the first graph would run
            self._start()

    def _start(self) -> None:
        """Decide on the sites, if a compiled call begins that this is the backend of, and watch them."""
        call = running_call()
        if call is None or call.backend is not self:
            return
        if self._base is None:
            if call.model is None:
                raise AdapterError(
                    "backend(cfg) was given to torch.compile with a function. It finds sites by their names in a model:"
                    " compile the model or its forward, or a function that calls an adapted model."
                )
            self.adapt(call.model, *call.args, **call.kwargs)
        assert self._base is not None
        if call.started is not None and not self._base.watching:
            raise AdapterError(
                f"torch.compile captures nothing up to {call.started}, which may have run sites without their adapters"
                " by now. The way out: compile the backend's model, which carries its adapters, with"
                ' backend="lora_lite_fx"; or, after torch._dynamo.reset(), make a new backend.'
            )
        self._base.watch(call)


compile_graph = backend()
"""The backend by the name of `"lora_lite_fx"`: for models that carry their adapters."""


def adapt_compiled(
    model: nn.Module, cfg: Config, example_inputs: Inputs, *, inner: str | Compiler = "inductor"
) -> nn.Module:
    """A copy of `model` that carries adapters and runs compiled: for a model that export cannot capture.

    Args:
        model: any module; it is not changed.
        cfg: a variant, or several.
        example_inputs: a tuple of positional or a dict of keyword arguments. The model runs on them, and what runs is
            what can be adapted.
        inner: as for `backend`.

    Returns:
        The copy, of the same class and with the weights shared; only the adapters' parameters require grad.

    Raises:
        SelectionError: a config's targets match no site.
        ConfigError: `cfg` is no variant, or does not fit a site; or a site is no module of its own.
    """
    args, kwargs = (example_inputs, {}) if isinstance(example_inputs, tuple) else ((), example_inputs)
    carrier = CompiledModel(model, as_variants(cfg), args, kwargs).carrier
    carrier.forward = torch.compile(carrier.forward, backend=backend(inner=inner))
    return carrier


def _raising(error: AdapterError) -> Compiled:
    def run(*inputs: Any) -> Any:
        raise error

    return run
