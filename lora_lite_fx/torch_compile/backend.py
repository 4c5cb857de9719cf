"""Insert adapters inside `torch.compile`, for models that export cannot capture.

`backend(cfg).adapt(model, *inputs)` returns a copy of the model that carries adapters, and `torch.compile` runs it.
Start here: a graph that Dynamo captures comes to `Backend.__call__`. `marked_graph` compiles those in which adapted
modules left their marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn

from ..adapters.bank import check_no_bank
from ..adapters.named_configs import Config, as_adapters
from ..adapters.variant import Variant
from ..errors import AdapterError, ConfigError, shown
from ..graph.sharded import refuse_sharded
from ..graph.tensors import outside_inference_mode
from ..log import phase
from ..rewriting.choose_sites import check_gradients, choose_sites
from .dynamo_graph import Compiled, Compiler
from .inner import Inner
from .marked_graph import compile_marked, has_marks
from .marked_model import ORIGINALS, mark_sites
from .record_run import record_run

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

    `adapted = backend(cfg).adapt(model, *inputs)` returns a copy of the model that carries the adapters;
    `torch.compile(adapted, backend="lora_lite_fx")` runs it. A model that breaks into several graphs is adapted in each
    of them. To compile with other settings than the default ones, pass this backend in place of the name.

    An adapted model never runs without its adapters, also where torch.compile captures nothing: a site that runs
    outside the graphs is an error that names it. An adapted model can be part of other modules and of compiled
    functions. Where its layers break into graphs, each has a graph of its own, which
    `torch._dynamo.config.recompile_limit` must allow.

    A model that carries no adapters is an error where torch.compile runs its first graph with parameters. With
    `backend(cfg)` that is any model but those that its `adapt` returned; without a config, a model of which an adapted
    copy was made, and any model before a first copy was made. Where torch.compile captures no graph
    (`torch.compiler.disable`, `TORCH_COMPILE_DISABLE=1`), no backend is asked: such a model runs as it is, without an
    error.

    Args:
        cfg: a variant, or several, as for `rewrite`. None for a backend that compiles models that are adapted already;
            the name `backend="lora_lite_fx"` stands for `backend()`.
        inner: the backend that compiles the rewritten graphs, or its name.
        mode: a setting of `inner`, as `torch.compile` takes it. It may also be given to `torch.compile` beside this
            backend: `torch.compile(adapted, backend="lora_lite_fx", mode="reduce-overhead")`.
        options: further settings of `inner`, as `mode`.

    Raises:
        ConfigError: `cfg` is not a variant; or there is no such `inner`, `mode` or option.
    """
    if isinstance(cfg, nn.Module):
        raise ConfigError(
            f"backend takes the config of the adapters, and {shown(cfg)} is a model. The call is"
            " backend(LoRA(r=8)).adapt(model, *inputs)."
        )
    if inner == NAME or isinstance(inner, Backend):
        raise ConfigError(f"inner compiles graphs that have their adapters, and {NAME!r} inserts them: leave it out.")
    adapters = () if cfg is None else tuple(as_adapters(cfg))
    check_no_bank((variant for _, variant in adapters), "backend", "The way out: rewrite or adapt, which compile too.")
    return Backend(adapters, Inner(inner, mode, options))


class Backend:
    """A backend that inserts adapters, see `backend`; Dynamo calls it with each graph.

    The compiled model raises this library's errors where the graph would have run:

    - AdapterError: a site would run without its adapters, or the graph is of a model that carries none.
    - ConfigError: there is no such mode or option.

    Args:
        adapters: for `adapt` to insert, by name and in this order; empty for models that carry their adapters.
        inner: the backend that compiles the rewritten graphs, with its settings.
    """

    def __init__(self, adapters: tuple[tuple[str, Variant], ...], inner: Inner) -> None:
        self.adapters = adapters
        self.inner = inner
        self._adapted: WeakSet[nn.Module] = WeakSet()

    def adapt(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Return a copy of `model` that carries the adapters, of the same class and with the weights shared.

        Args:
            model: any module; it is not changed.
            args, kwargs: inputs of its `forward`. The model runs on them once, and the linears that run on data are its
                sites. A linear that did not run is an error if it runs later and the config may mean it.

        Returns:
            The copy. Only the adapters' parameters require grad. It runs under `torch.compile` with
            `backend="lora_lite_fx"` or with this backend only.

        Raises:
            SelectionError: a config's targets match no site.
            ConfigError: a config does not fit a site, a site is not a module of its own, or gradients do not pass
                through the frozen weights; or the backend has no config.
        """
        if not self.adapters:
            raise ConfigError("backend() has no adapters. The call is backend(LoRA(r=8)).adapt(model, *inputs).")
        check_gradients(model)
        way_out = (
            "rewrite or adapt the whole model, and divide the result by llfx.parallelize(model) or llfx.shard(model)"
        )
        refuse_sharded(model, "backend cannot adapt a model", way_out)
        with outside_inference_mode(), torch.enable_grad():
            run = record_run(model, args, kwargs)
            adapted = mark_sites(model, choose_sites(run, self.adapters, None), run.meta["called"])
        self._adapted.add(adapted)
        return adapted

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
            with phase("derived the program of a graph", "deriving the program of a graph") as details:
                details.append(f"{len(gm.graph.nodes)} nodes")
                if has_marks(gm):
                    return compile_marked(gm, inputs, inner)
                self._refuse_other_models(gm, inputs)
                return inner(gm, inputs)
        except AdapterError as error:
            return _raising(error)  # later and as it is, because Dynamo wraps the errors of a backend

    def _refuse_other_models(self, gm: fx.GraphModule, inputs: list[Any]) -> None:
        """Raise AdapterError if a graph without marks is of a model that carries no adapters, as far as can be told.

        A graph without marks may be a part of an adapted model that has no sites. With a config, it is one only if it
        reads no parameter of another model. Without, an adapted model may be a part of any other: refused is a graph of
        a model of which an adapted copy was made, and any graph with parameters before a first copy was made.
        """
        nodes = gm.graph.find_nodes(op="placeholder")
        read = {id(t): node.name for node, t in zip(nodes, inputs, strict=True) if isinstance(t, nn.Parameter)}
        if self.adapters:
            others = read.keys() - _parameters(self._adapted)
        else:
            originals = [model for original in ORIGINALS if (model := original()) is not None]
            others = read.keys() & _parameters(originals) if ORIGINALS else set(read)
        if others or (self.adapters and not self._adapted):
            reads = next((f" that reads {name}," for tensor, name in read.items() if tensor in others), "")
            beside = (
                "other models beside it need backend()" if self.adapters else "llfx.active(adapted, None) is its base"
            )
            raise AdapterError(
                f"torch.compile captured a graph{reads} of a model that carries no adapters. The way out: adapted ="
                " lora_lite_fx.backend(cfg).adapt(model, *inputs), then torch.compile(adapted,"
                f' backend="lora_lite_fx"); {beside}.'
            )


def _parameters(models: Iterable[nn.Module]) -> set[int]:
    """Return the ids of all parameters of these models."""
    return {id(parameter) for model in models for parameter in model.parameters()}


compile_graph = backend()
"""The backend that is registered under `NAME`."""


def _raising(error: AdapterError) -> Compiled:
    """Return a function that raises `error`, in the place of a compiled graph."""

    def run(*inputs: Any) -> Any:
        raise error

    return run
