"""`frozen`: a scope in which nobody changes a parameter, so that what depends on parameters alone is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapters.placement import placements
from ..compat.torch import version_of
from ..errors import AdapterError, shown
from ..graph.calls_and_traces import tracing
from ..graph.direct_calls import ORDINARY
from ..graph.sharded import reshard

Model = TypeVar("Model", bound=nn.Module)


class KeptValues:
    """The values that a program needs of modules, kept while a scope is open.

    Args:
        values: for the rest of the program, and for each of its pieces.
        tensors: those that the values were computed from.
        ids: of banks, the slots of the rows that the values are for.
    """

    def __init__(self, values: list[tuple[Any, ...]], tensors: Iterable[Any], ids: Tensor | None) -> None:
        self.values, self.ids = values, ids
        self._autocast = _autocast_mode()
        # Tensors that were made in inference mode count no versions: writes to them are not noticed.
        self._tensors = [tensor for tensor in tensors if type(tensor) in ORDINARY and not tensor.is_inference()]
        self._versions = [*map(version_of, self._tensors)]

    def fit(self) -> bool:
        """Check whether a call may use the values: not in another mode of autocast, on which their types depend.

        Raises:
            AdapterError: a tensor that values were computed from was written to.
        """
        if not torch.compiler.is_compiling() and list(map(version_of, self._tensors)) != self._versions:
            raise changed_inside("A parameter was written to")
        return bool(self._autocast == _autocast_mode())


def _autocast_mode() -> tuple[Any, ...]:
    return tuple(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))


@runtime_checkable
class KeepsValues(Protocol):
    """A module that keeps values in a `frozen` scope."""

    def keep_values(self) -> None:
        """Keep values from now on."""

    def drop_values(self) -> None:
        """Drop all values, and keep none from now on."""


_scopes: dict[int, int] = {}
"""How many scopes are open, by the id of the model: scopes may be nested, and opened by several threads."""


@contextmanager
def frozen(model: Model) -> Iterator[Model]:
    """Open a scope in which no parameter of `model` changes.

    Inside, calls without gradients in evaluation mode compute once what depends on parameters alone: norms, rotations,
    folded factors. Outside, each call computes that from the parameters that are there. `generate` of an adapted model
    opens the scope itself. Compiled calls take the kept values as inputs. Calls with gradients keep nothing.

    A step of an optimizer and `load_state_dict` are errors at once, other writes at the next call or at the end of the
    scope. An assignment to `.data`, as `torch.nn.utils.vector_to_parameters` makes it, is an error at the end. Writes
    to elements of `.data`, by numpy and by collectives are not noticed, nor are writes to tensors that were made in
    inference mode. Modules of an adapted model that are replaced inside, and numbers of modules that are set, act when
    the scope has ended. Sharded parameters are not kept.

    Args:
        model: the result of `rewrite`, `load`, `wrap` or `adapt`. A result of `wrap` is watched, and keeps nothing.

    Yields:
        The model.

    Raises:
        AdapterError: `model` has no adapters; or a parameter was changed inside the scope.
    """
    if not isinstance(model, nn.Module) or not (isinstance(model, KeepsValues) or placements(model)):
        raise AdapterError(
            f"frozen takes a model with adapters, which rewrite, load, wrap or adapt returned, not {shown(model)}."
        )
    reshard(model)
    before = dict(model.named_parameters())
    versions = {name: version_of(tensor) for name, tensor in before.items() if not tensor.is_inference()}
    data = {name: tensor.data_ptr() for name, tensor in before.items() if type(tensor) in ORDINARY}
    watched = set(map(id, before.values()))

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(parameter) in watched for group in optimizer.param_groups for parameter in group["params"]):
            raise changed_inside(f"{type(optimizer).__name__}.step() was called on the model's parameters")

    step = register_optimizer_step_pre_hook(refuse)
    load = model.register_load_state_dict_pre_hook(_refuse_to_load)  # type: ignore[no-untyped-call]
    _enter(model)
    try:
        yield model
    finally:
        _leave(model)
        step.remove()
        load.remove()
    reshard(model)
    after = dict(model.named_parameters())
    for name, tensor in before.items():
        if after.get(name) is not tensor:
            raise changed_inside(f"{name} was replaced")
        if name in versions and version_of(tensor) != versions[name]:
            raise changed_inside(f"{name} was written to")
        if name in data and tensor.data_ptr() != data[name]:
            raise changed_inside(f"{name} was given other data")


def _refuse_to_load(*_: Any) -> None:
    raise changed_inside("load_state_dict was called")


def changed_inside(what: str) -> AdapterError:
    """Return the error for a change of a parameter inside the scope.

    Args:
        what: what was done, as a clause.
    """
    return AdapterError(
        f"{what} inside llfx.frozen(model), where values computed from the parameters are kept. The way out: leave the"
        " scope before a parameter changes."
    )


def _enter(model: nn.Module) -> None:
    with tracing():
        _scopes[id(model)] = _scopes.get(id(model), 0) + 1
        if _scopes[id(model)] == 1 and isinstance(model, KeepsValues):
            model.keep_values()


def _leave(model: nn.Module) -> None:
    with tracing():  # a call of another thread may use the values, without a scope of its own
        _scopes[id(model)] -= 1
        if not _scopes[id(model)]:
            del _scopes[id(model)]
            if isinstance(model, KeepsValues):
                model.drop_values()
