"""Switches: which adapters of a model act, and by how much.

They are values of the model and no part of its graph: its tensors stay, and a call computes what the switches say then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType, TracebackType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx, nn

from ..errors import AdapterError, ConfigError, shown
from ..graph.direct_calls import can_read_values
from ..graph.tensors import tensor_of
from .bank import check_ids, check_slots
from .changed_buffers import warn_of_moved_base
from .placement import adapter_names, adapter_tensor_names, bank_slots
from .state import adapter_tensors

Model = TypeVar("Model", bound=nn.Module)
Coefficient = float | Tensor


@dataclass(frozen=True)
class Switches:
    """The switches of a model's adapters.

    Args:
        acting: the names of the adapters that act, in the order of the model; None for all.
        scales: by name, the coefficient of an adapter that is scaled: a tensor `()`, or `(batch,)` with one for each
            row of the batch.
        ids: for banks, the slot of each row of the batch; None if calls say it.
    """

    acting: tuple[str, ...] | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None

    def acts(self, name: str) -> bool:
        """Return whether the adapter of this name acts."""
        return self.acting is None or name in self.acting

    def scales_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the coefficients of those of the adapters that act and are scaled."""
        return {name: self.scales[name] for name in names if name in self.scales and self.acts(name)}

    def moved_to(self, device: torch.device) -> Switches:
        """Return the switches with their tensors on another device."""
        scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return replace(self, scales=scales, ids=None if self.ids is None else self.ids.to(device))

    def constants(self, purpose: str) -> dict[str, float]:
        """Return the coefficients as numbers.

        Args:
            purpose: says in an error what they are needed for, as a clause.

        Raises:
            AdapterError: there is one for each row, or one that needs a gradient.
        """
        for name, scale in self.scales.items():
            if self.acts(name) and (scale.dim() or scale.requires_grad):
                what = "one coefficient for each row" if scale.dim() else "a coefficient that needs a gradient"
                raise AdapterError(
                    f"{purpose} takes one number for each adapter, and {name!r} has {what}. The way out: leave the"
                    " scope of scaled, or scale by a number."
                )
        return {name: float(scale) for name, scale in self.scales.items() if self.acts(name)}


@runtime_checkable
class HasSwitches(Protocol):
    """A model whose calls follow switches."""

    switches: Switches


class Scope(Generic[Model]):
    """A change of switches that lasts, or ends with the scope if it is used as `with active(model, "fr"):`.

    Leaving the scope takes back this change alone.
    """

    def __init__(self, model: Model, undo: Callable[[], None]) -> None:
        self._model = model
        self._undo = undo

    def __enter__(self) -> Model:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()


def active(model: Model, names: str | Sequence[str] | EllipsisType | None = ...) -> Scope[Model]:
    """Let these adapters act, and no others: as a call `active(model, "fr")`, or as a scope `with active(...):`.

    The tensors of the others stay as they are; they cost no time, and get no gradient. What a program of the model
    computes is derived once for each set of adapters, so that going back to a set compiles nothing.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        names: the name of one adapter, or several; None or `[]` for the frozen model, bit for bit, but for buffers
            that training has changed: the model has one value of each, with adapters and without. All adapters act if
            it is left out.

    Returns:
        A scope; leaving it lets those act that acted before.

    Raises:
        AdapterError: the model has no adapters, or does not follow switches.
        ConfigError: it has no adapter of such a name.

    Warns:
        UserWarning: no adapter is to act, and training has changed buffers.
    """
    holder = _holder(model)
    before = holder.switches.acting
    present = adapter_names(model)
    chosen = present if isinstance(names, EllipsisType) else known_names(model, names or [])
    acting = None if set(chosen) == set(present) else tuple(name for name in present if name in chosen)
    holder.switches = replace(holder.switches, acting=acting)
    if acting == ():
        warn_of_moved_base(model)

    def undo() -> None:
        holder.switches = replace(holder.switches, acting=_still(before, model))

    return Scope(model, undo)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let these adapters act and train, and no others, as PEFT's function of this name does.

    The parameters of the others do not require gradients from now on, so that `adapter_parameters` and counts of what
    trains leave them out. `active` switches without that.

    Args:
        model: as for `active`.
        names: the name of one adapter, or several.

    Raises:
        AdapterError, ConfigError: as `active`.
    """
    active(model, names)
    trained = {path for name in known_names(model, names or []) for path in adapter_tensor_names(model, name)}
    for path in adapter_tensor_names(model):
        let_train(model, [path], path in trained)


def let_train(model: nn.Module, paths: Iterable[str], trains: bool) -> None:
    """Let the parameters among these tensors of a model require gradients, or not."""
    for path in paths:
        if isinstance(tensor := tensor_of(model, path), nn.Parameter):
            tensor.requires_grad_(trains)


def scaled(
    model: Model, c: Coefficient | Mapping[str, Coefficient], names: str | Sequence[str] | None = None
) -> Scope[Model]:
    """Scale adapters: every site computes `y = base + c (adapted - base)`. As a call, or as `with scaled(model, 0.5):`.

    1 is the adapter and 0 the frozen model, both to the bit; any other number is allowed, as `-1` to steer away. A
    coefficient is an input of the compiled program, so that changing it compiles nothing.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        c: a number, a tensor `()`, or a tensor `(batch,)` with one coefficient for each row of the batch, which is the
            first dimension of the model's inputs. Or a dict of such by names of adapters. A tensor that requires grad
            gets one.
        names: the adapters to scale, where `c` is not a dict; None for all.

    Returns:
        A scope; leaving it gives these adapters the coefficients that they had before.

    Raises:
        AdapterError: the model has no adapters, or does not follow switches. At a call: the batch has another number
            of rows than there are coefficients; or the graph does not prove at a site which row is which.
        ConfigError: the model has no adapter of such a name; or a coefficient is not a real, finite number or tensor of
            them.
    """
    holder = _holder(model)
    if isinstance(c, Mapping):
        if names is not None:
            raise ConfigError("scaled takes the names of adapters in c, or in names, not in both.")
        given = {name: c[name] for name in known_names(model, list(c))}
    else:
        given = dict.fromkeys(adapter_names(model) if names is None else known_names(model, names), c)
    device = tensor_of(model, adapter_tensor_names(model)[0]).device
    new = {name: _coefficient(value, device) for name, value in given.items()}
    before = {name: holder.switches.scales.get(name) for name in new}
    holder.switches = replace(holder.switches, scales={**holder.switches.scales, **new})

    def undo() -> None:
        scales = {name: scale for name, scale in holder.switches.scales.items() if name not in before}
        present = adapter_names(model)  # one may have been deleted meanwhile
        old = {name: scale for name, scale in before.items() if scale is not None and name in present}
        holder.switches = replace(holder.switches, scales={**scales, **old})

    return Scope(model, undo)


def by_row(model: Model, names: Sequence[str | None] | Tensor) -> Scope[Model]:
    """Let each row of a batch have an adapter of its own: as a call, or as `with by_row(model, ["fr", None, "de"]):`.

    Every adapter that is named computes all rows, and is scaled by 1 or 0 in each. That is exact, and made for a few
    adapters; it costs as many branches as there are different names. For many adapters of one config there is `Bank`,
    whose slots a tensor of ids says: `with by_row(model, torch.tensor([3, -1, 0])):`.

    Args:
        model: a result of `rewrite`, `wrap`, `adapt` or `load`.
        names: for each row of the batch the name of its adapter, or None for the frozen model; or, of a model with a
            bank, a tensor `(batch,)` of its slots, and -1 for the frozen model.

    Returns:
        A scope; leaving it takes back what `active` and `scaled` were.

    Raises:
        AdapterError: as `active` and `scaled`. At a call: the batch has another number of rows; or the graph does not
            prove at a site which row is which, because the model reorders, repeats or joins rows before it.
        ConfigError: the model has no adapter of such a name, or `names` is empty; or they are ids, and the model has no
            bank.
    """
    if isinstance(names, Tensor):
        return _slots_by_row(model, names)
    if isinstance(names, str) or not len(names):
        raise ConfigError(f"by_row takes a name, or None, for each row of the batch: ['fr', None], not {names!r}.")
    used = known_names(model, list(dict.fromkeys(name for name in names if name is not None)))
    rows = {name: torch.tensor([float(each == name) for each in names], dtype=torch.float64) for name in used}
    present = _holder(model).switches.scales
    rows = {name: row if name not in present else row.to(present[name]) * present[name] for name, row in rows.items()}
    chosen, weighted = active(model, used), scaled(model, rows)

    def undo() -> None:
        weighted.__exit__(None, None, None)
        chosen.__exit__(None, None, None)

    return Scope(model, undo)


def _slots_by_row(model: Model, ids: Tensor) -> Scope[Model]:
    holder = _holder(model)
    banks = bank_slots(model)
    if not banks:
        raise ConfigError("by_row takes a tensor of slots for a model with a bank, and this one has none.")
    acting = [slots for name, slots in banks.items() if holder.switches.acts(name)]
    check_slots(check_ids(ids), min(acting or banks.values()))
    before = holder.switches.ids
    holder.switches = replace(holder.switches, ids=ids)

    def undo() -> None:
        holder.switches = replace(holder.switches, ids=before)

    return Scope(model, undo)


def coefficients(model: nn.Module, purpose: str) -> dict[str, float] | None:
    """Return the number by which each adapter acts that does; None for a model whose calls do not follow switches.

    Args:
        model: an adapted model.
        purpose: says in an error what they are needed for.

    Raises:
        AdapterError: as `Switches.constants`.
    """
    if not isinstance(model, HasSwitches):
        return None
    acting = dict.fromkeys(filter(model.switches.acts, adapter_names(model)), 1.0)
    return acting | model.switches.constants(purpose)


def _still(acting: tuple[str, ...] | None, model: nn.Module) -> tuple[str, ...] | None:
    """Return those of the names that the model still has."""
    present = adapter_names(model)
    return acting if acting is None else tuple(name for name in acting if name in present)


def _coefficient(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, (bool, complex)) or not isinstance(value, (int, float, Tensor)):
        raise ConfigError(f"A coefficient is a number, or a tensor () or (batch,) of numbers, not {shown(value)}.")
    if not isinstance(value, Tensor):
        if not math.isfinite(value):
            raise ConfigError(f"A coefficient is a finite number, not {value}.")
        return torch.tensor(float(value), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    if value.dim() > 1 or value.dtype == torch.bool or value.is_complex():
        raise ConfigError(
            f"A tensor of coefficients is () or (batch,) and of real numbers, not {tuple(value.shape)} of"
            f" {value.dtype}."
        )
    if can_read_values(value) and not value.isfinite().all():
        raise ConfigError("A coefficient is NaN or infinite.")
    return (value if value.is_floating_point() else value.float()).to(device)


def _holder(model: object) -> HasSwitches:
    adapter_tensors(model)  # type: ignore[arg-type]  # refuses a model without adapters, and says what to pass instead
    if isinstance(model, HasSwitches):
        return model
    way_out = "optimize(model) returns one that does" if isinstance(model, fx.GraphModule) else "adapt it itself"
    raise AdapterError(
        f"{type(model).__name__} has adapters and does not follow switches, because its calls are not this library's."
        f" The way out: {way_out}."
    )


def known_names(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list.

    Raises:
        ConfigError: the model has no adapter of such a name.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    present = adapter_names(model)
    if unknown := [name for name in chosen if name not in present]:
        raise ConfigError(f"The model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, present))}.")
    return chosen
