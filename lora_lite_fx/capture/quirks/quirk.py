"""The protocol of a quirk: which models it concerns, and what to enter while these are traced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The positional and the keyword arguments of a call."""

ANSWERED: set[str] = set()
"""Functions that ask the process for its state, and whose regions a quirk makes a part of the graph, by their names."""


@dataclass(frozen=True)
class Quirk:
    """A construct of some models that a trace cannot follow by itself.

    Args:
        concerns: whether a model needs it. Called with the model and None before the first trace, and with the model
            and the error of each trace that failed.
        entered: makes the context in which the model is traced, for the model and its call.
        check: checks the graph after the trace, with what the context has yielded; raises CaptureError.
    """

    concerns: Callable[[nn.Module, Exception | None], bool]
    entered: Callable[[nn.Module, Call], AbstractContextManager[Any]]
    check: Callable[[Any, fx.GraphModule], None] | None = None


def always(model: nn.Module, error: Exception | None) -> bool:
    """Concern every model, before its first trace."""
    return error is None


def after_failure(model: nn.Module, error: Exception | None) -> bool:
    """Concern the models of which a trace failed."""
    return error is not None


def after_undecided(model: nn.Module, error: Exception | None) -> bool:
    """Concern the models of which a trace failed because they decide by the values of tensors."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return error is not None and isinstance(error.__cause__, GuardOnDataDependentSymNode)


def where_mentioned(word: str) -> Callable[[nn.Module, Exception | None], bool]:
    """Concern the models whose files have a word in their source text, and those of which a trace failed."""

    def concerns(model: nn.Module, error: Exception | None) -> bool:
        return error is not None or any(word in _source_of(file) for file in files_of(model))

    return concerns


def files_of(model: nn.Module) -> Iterator[ModuleType]:
    """Yield the Python files of the classes of a model's modules, without those of torch."""
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        if name.partition(".")[0] != "torch" and (file := sys.modules.get(name)) is not None:
            yield file


def _source_of(file: ModuleType) -> str:
    try:
        return inspect.getsource(file)
    except (OSError, TypeError):  # of a notebook
        return ""
