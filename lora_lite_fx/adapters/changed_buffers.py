"""Buffers that calls change, as batch norm changes its statistics in training: how far they are from the base's.

An adapted model writes to copies of its own, because the user's model never changes. Under `base_buffers` it has those
of the base by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from ..compat.torch_modules import is_persistent
from ..errors import AdapterError
from ..graph.sharded import copy_values, whole
from ..graph.tensors import has_attribute, has_values, register_tensor, tensor_of
from ..graph.writes import written_buffers

BaseBuffers = Mapping[str, Tensor | None]
"""The base's buffers by name; None for a value that nobody knows, as of the base of a graph from a file."""


@runtime_checkable
class HasBaseBuffers(Protocol):
    """A model that has copies of some buffers of its base."""

    base_buffers: BaseBuffers


def base_buffers_of(model: nn.Module) -> BaseBuffers:
    """Return the base's buffers of which `model` has copies; of a graph from a file, their names alone."""
    if isinstance(model, HasBaseBuffers):
        return model.base_buffers
    return dict.fromkeys(written_buffers(model)) if isinstance(model, fx.GraphModule) else {}


def moved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `model` that differ from the base's, by name.

    Buffers that are not persistent are left out, because the model itself says that its state does not hold them.
    """
    names = (name for name in base_buffers_of(model) if has_attribute(model, name))  # a stage of a pipeline has its own
    return moved_from_base(model, {name: whole(tensor_of(model, name).detach()) for name in names})


def moved_from_base(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of `values`, of buffers of a model by name, that differ from the base's, as `moved_buffers`."""
    base = base_buffers_of(model)
    moved: dict[str, Tensor] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        in_base = base[name] if name in base else tensor_of(model, name)
        if is_persistent(model.get_submodule(path), leaf) and not _is_same(value, in_base):
            moved[name] = value
    return moved


def put_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values of buffers into a graph or a wrapped model, which gets copies of those that it shares."""
    base = dict(base_buffers_of(model))
    for name, value in values.items():
        now = tensor_of(model, name)
        if name not in base:
            base[name], now = now, now.clone()
            register_tensor(model, name, now)
        copy_values(now, value)
    if isinstance(model, HasBaseBuffers):
        model.base_buffers = base


def give_back_buffers(model: nn.Module) -> None:
    """Write the base's values into the buffers of a graph.

    Warns:
        UserWarning: the graph is from a file, which does not have them.
    """
    base = base_buffers_of(model)
    put_buffers(model, {name: value for name, value in base.items() if value is not None})
    if unknown := [name for name, value in base.items() if value is None]:
        warnings.warn(
            f"remove leaves {_shown(unknown)} as they are, because a graph from a file does not have the base's values"
            " of buffers that calls change.",
            stacklevel=3,
        )


def check_same_buffers(
    model: nn.Module, moved: Mapping[str, Tensor], source: object, error: type[Exception] = AdapterError
) -> None:
    """Check that an adapter may be put beside those of a model, as for the buffers that it was trained with.

    Args:
        model: has adapters.
        moved: the buffers that differ from the base's where the adapter was trained.
        source: where it comes from, for messages.
        error: the class of the error.

    Raises:
        error: they differ from those of the model, which has one value of each for all its adapters.

    Warns:
        UserWarning: the model's differ from the base's, and the source has the base's.
    """
    if other := [name for name, value in moved.items() if not _is_same(whole(tensor_of(model, name)), value)]:
        raise error(
            f"{source}: the adapter was trained with other values of {_shown(other)} than the model has now, and all"
            " adapters of a model have one value of each. Nothing was changed. The way out: load it alone,"
            " llfx.load(base, path); or call eval() on these modules of the base before adapters are trained that"
            " are to be in one model."
        )
    if left := [name for name in moved_buffers(model) if name not in moved]:
        warnings.warn(
            f"{source}: the adapter was made for the base's values of {_shown(left)}, which training has changed in"
            " this model. The way out: load it into the base, or into remove(model).",
            stacklevel=3,
        )


def warn_of_lost_buffers(model: nn.Module, call: str, way_out: str, stacklevel: int = 2) -> None:
    """Warn of the buffers that training has changed, because `call` leaves them out.

    Args:
        model: an adapted model.
        call: the function, and what it does.
        way_out: an imperative.
        stacklevel: as for `warnings.warn`, seen from here.
    """
    if moved := moved_buffers(model):
        warnings.warn(
            f"{call} adapters only, and training has changed {_shown([*moved])} too: these are left out. The way out:"
            f" {way_out}.",
            stacklevel=stacklevel + 1,
        )


def warn_of_moved_base(model: nn.Module, stacklevel: int = 2) -> None:
    """Warn of the buffers that training has changed, because a model without acting adapters has them as they are.

    Args:
        model: an adapted model, in which no adapter acts.
        stacklevel: as for `warnings.warn`, seen from here.
    """
    if moved := moved_buffers(model):
        warnings.warn(
            f"Without its adapters the model is not the base, because training has changed {_shown([*moved])}. The way"
            " out: remove(model) has the base's values.",
            stacklevel=stacklevel + 1,
        )


def warn_of_moving_buffers(model: nn.Module, stacklevel: int = 2) -> None:
    """Warn of the buffers that calls of a model change besides its adapters, if it is in training.

    Args:
        model: a graph or a wrapped model, whose adapters are new.
        stacklevel: as for `warnings.warn`, seen from here.
    """
    owners = ((name, model.get_submodule(name.rpartition(".")[0])) for name in base_buffers_of(model))
    moving = [name for name, owner in owners if owner.training and is_persistent(owner, name.rpartition(".")[2])]
    if moving:
        warnings.warn(
            f"Calls in training change {_shown(moving)} besides the adapters, in a copy. save writes them if they"
            " differ from the base's, and load reads them; files of PEFT and adapter_state_dict leave them out. The"
            " way out, if they are to stay: call eval() on these modules, or on the model, before it is adapted.",
            stacklevel=stacklevel + 1,
        )


def _is_same(now: Tensor, base: Tensor | None) -> bool:
    if not has_values(now):  # without data there is nothing to save
        return True
    return base is not None and has_values(base) and torch.equal(now, base.to(now))


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"the buffer{'s' if len(names) > 1 else ''} {', '.join(names[:2])}{more}"
