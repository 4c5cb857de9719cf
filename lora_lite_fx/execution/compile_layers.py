"""`compile_layers`: let torch.compile compile each kind of layer once, in place of the whole model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from ..compat.torch import ISOLATED
from ..errors import AdapterError, shown

Model = TypeVar("Model", bound=nn.Module)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class LayerCompiler:
    """Compiles what layers run.

    Args:
        options: of torch.compile.
    """

    def __init__(self, **options: Any) -> None:
        self.options = {**ISOLATED, **options}
        torch.compile(lambda: None, **self.options)  # checks the options; nothing is compiled before it is called

    def __call__(self, function: _Function) -> _Function:
        """Return the function, to be compiled when it is called."""
        if not isinstance(function, types.FunctionType):
            raise TypeError(f"A function is compiled, not {function!r}.")
        # torch.compile counts recompilations by code object, so each kind of layer needs one of its own.
        function.__code__ = function.__code__.replace()
        compiled: Any = torch.compile(function, **self.options)
        return compiled  # type: ignore[no-any-return]


@runtime_checkable
class HasCompiledLayers(Protocol):
    """A model whose calls run layers that can be compiled."""

    def compile_layers_by(self, compiler: LayerCompiler | None) -> None:
        """Compile what the layers run from now on; or no longer, for None."""


def compile_layers(model: Model, **options: Any) -> Model:
    """Compile each kind of layer once, and run what stands around the layers as it is; in place.

    The layers of a model are one piece of code over other tensors, as a rule: it is compiled once for all of them, and
    once more for the first layer in training, whose input needs no gradient. So the time of compilation does not grow
    with depth, where `torch.compile(model)` compiles all layers as one graph. Nothing is compiled before the next call.
    Switching adapters, `frozen`, `generate` and checkpointed layers go on as before, each with a program of its own.

    Args:
        model: a result of `rewrite`, `capture`, `load` or `adapt`.
        options: of `torch.compile`: `backend`, `mode`, `dynamic`, `fullgraph` and so on. `disable=True` goes back to
            layers that are not compiled.

    Returns:
        The model.

    Raises:
        AdapterError: it is another model, or a graph without layers: elements of a ModuleList or Sequential.
        TypeError, RuntimeError: torch.compile does not take the options.
    """
    if not isinstance(model, HasCompiledLayers):
        raise AdapterError(
            "compile_layers takes what rewrite, capture, load or adapt returned, not"
            f" {shown(model)}. The way out, for another model: compile its layers themselves, as"
            " `for layer in model.layers: layer.compile()`."
        )
    compiler = LayerCompiler(**options)
    model.compile_layers_by(None if options.get("disable") else compiler)
    return model
